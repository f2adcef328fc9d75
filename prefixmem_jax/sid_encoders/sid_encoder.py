"""What fits the SID slot: anything that maps tokens to a vector per position."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from prefixmem_jax.config_groups import Rate
from prefixmem_jax.kinds import Kind
from prefixmem_jax.layers.dropout import dropout
from prefixmem_jax.memory.table import Table
from prefixmem_jax.parallel.sharding import constrain, take_positions
from prefixmem_jax.semantic_ids.space import SidSpace
from prefixmem_jax.semantic_ids.vocabulary import Vocabulary


class SidEncoder(nnx.Module):
    """Token ids and segment ids to a vector per position, zero where it is not active.

    It may own dense parameters (part `sid_encoder`), rows of a memory table (part `memory`), or
    both.

    Rows live outside the module, sharded over the mesh: `addresses` says which ones a batch needs,
    the caller fetches them and hands them to `__call__`. Training, prefill and cached decoding all
    go this way.
    """

    vocabulary: Vocabulary

    @property
    def reach(self) -> int:
        """How many tokens before a position its vector depends on: those of the item's prefix."""
        return self.vocabulary.levels - 1

    def addresses(
        self, tokens_BS: jax.Array, segment_ids_BS: jax.Array, last: int | None = None
    ) -> jax.Array | None:
        """Rows to fetch: int32 [B, P, any], negative for none; None if it owns no table.

        Args:
          last: P, where the vectors of the last P positions are asked for. None means all; P
            positions are then `looked_up`.
        """
        del tokens_BS, segment_ids_BS, last
        return None

    def looked_up(self, tokens_BS: jax.Array, segment_ids_BS: jax.Array) -> jax.Array:
        """The positions whose rows `addresses` names, int32 [B, P], no two alike: all."""
        del segment_ids_BS
        return jnp.broadcast_to(jnp.arange(tokens_BS.shape[1]), tokens_BS.shape)

    def active(self, tokens_BS: jax.Array, segment_ids_BS: jax.Array) -> jax.Array:
        """Where it has something to say: bool [B, S]."""
        raise NotImplementedError

    def __call__(
        self,
        tokens_BS: jax.Array,
        segment_ids_BS: jax.Array,
        rows_BPAW: jax.Array | None,
        last: int | None = None,
    ) -> jax.Array:
        """Vectors float32 [B, S, d_model], or of the last positions.

        Args:
          rows_BPAW: rows at the `addresses`, zero where there was none; None if it owns no table.
          last: how many positions at the end are asked for; None means all. Decoding asks for one,
            and gives the `reach` tokens before it.
        """
        raise NotImplementedError

    def gate(self, vectors_BSD: jax.Array, embeddings_BSD: jax.Array) -> jax.Array:
        """What of its vectors is added to the embeddings of the same tokens: all."""
        del embeddings_BSD
        return vectors_BSD

    def drop_rows(
        self,
        tokens_BS: jax.Array,
        segment_ids_BS: jax.Array,
        rows_BPAW: jax.Array | None,
        rate: float,
        key: jax.Array | None,
    ) -> jax.Array | None:
        """Rows at the `addresses` of which a share is zeroed; as they are without a key."""
        if rows_BPAW is None or key is None or not rate:
            return rows_BPAW
        # By position, so that any mesh draws alike: which are looked up depends on it.
        axes, shape = ("batch", None, None), (*tokens_BS.shape, rows_BPAW.shape[2])
        kept_BSA = dropout(constrain(jnp.ones(shape, rows_BPAW.dtype), *axes), rate, key, *axes)
        kept_BPA = take_positions(kept_BSA, self.looked_up(tokens_BS, segment_ids_BS))
        return rows_BPAW * constrain(kept_BPA, "batch", "shared_length", None)[..., None]


@dataclass(frozen=True)
class SidEncoderConfig(Kind, ABC):
    """Base of SID encoders' config groups.

    Attributes:
      dropout: share of the fetched rows that are zeroed in training.
    """

    dropout: Rate = field(default=0.0, kw_only=True)

    package: ClassVar[str] = "prefixmem_jax.sid_encoders"

    @abstractmethod
    def build(
        self, vocabulary: Vocabulary, d_model: int, output_std: float | None, rngs: nnx.Rngs
    ) -> SidEncoder:
        """The encoder.

        Args:
          output_std: standard deviation of a fresh output projection; None keeps the vector's
            scale.
        """

    def divided(self, fsdp: int, tensor: int) -> list[tuple[str, int, int]]:
        """Keys whose sizes have to divide by so many devices of a mesh: key, size, devices."""
        del fsdp, tensor
        return []

    @property
    def reads_items(self) -> bool:
        """Whether its table has rows of whole items, which it adds up where an item ends."""
        return False

    def check_keys(self) -> None:
        """Raises UserError where its keys contradict each other, whatever the SIDs."""

    def check(self, space: SidSpace) -> None:
        """Raises UserError where it does not fit the SIDs."""

    def check_items(self, space: SidSpace) -> None:
        """Raises UserError where its rows of whole items do not tell all SIDs apart."""

    def table(self, space: SidSpace) -> Table | None:
        """The memory table it owns, if any."""
        del space
        return None

    def row_meaning(self, space: SidSpace) -> dict[str, np.ndarray]:
        """What its rows' meaning depends on, saved beside them and compared on restore."""
        del space
        return {}

    def explain_row_meaning(self, name: str, saved: np.ndarray) -> str:
        """What a saved array of `row_meaning` says, in words."""
        return f"another {name} ({saved})"
