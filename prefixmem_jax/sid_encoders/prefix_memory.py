"""PrefixMem: the encoder that turns a SID prefix into a vector (paper, Section "Method")."""

from __future__ import annotations

from dataclasses import dataclass

from flax import nnx
from pydantic import PositiveInt

from prefixmem_jax.config_groups import DType, Seed
from prefixmem_jax.errors import UserError
from prefixmem_jax.memory.hashing import AddressScheme
from prefixmem_jax.semantic_ids.vocabulary import Vocabulary
from prefixmem_jax.sid_encoders.sid_encoder import SidEncoder, SidEncoderConfig


@dataclass(frozen=True)
class PrefixMemoryConfig(SidEncoderConfig):
    """PrefixMem's sizes; defaults are the paper's.

    Attributes:
      target_levels: 1-based levels to help predict: (4, 5) adds the vector at the positions of
        c_3 and c_4.
      orders: N_max, the longest n-gram.
      heads: H, hash heads per n-gram.
      rows: T, rows in each of the orders * heads tables.
      d_mem: width of the memory vector; each row has d_mem / heads numbers.
      dtype: how rows are stored; bfloat16 rows are updated in float32 and rounded stochastically.
      address: which n-grams of the prefix are hashed, see `memory.hashing`.
      seed: fixes the hash multipliers. Tables mean nothing under other multipliers.
    """

    target_levels: tuple[PositiveInt, ...] = (4, 5)
    orders: PositiveInt = 4
    heads: PositiveInt = 4
    rows: PositiveInt = 2_000_000
    d_mem: PositiveInt = 256
    dtype: DType = "float32"
    address: AddressScheme = "prefix"
    seed: Seed = 0

    def check_keys(self) -> None:
        if self.d_mem % self.heads:
            raise UserError(
                f"sid_encoder.d_mem={self.d_mem} does not divide by sid_encoder.heads={self.heads}"
            )

    def build(
        self, vocabulary: Vocabulary, d_model: int, output_std: float, rngs: nnx.Rngs
    ) -> SidEncoder:
        raise NotImplementedError
