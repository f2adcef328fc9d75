"""PrefixMem: hashed prefix n-grams read rows of a memory table (paper, Section "Method")."""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from pydantic import NonNegativeInt, PositiveInt

from prefixmem_jax.config_groups import DType, Seed
from prefixmem_jax.errors import UserError
from prefixmem_jax.memory import hashing
from prefixmem_jax.memory.hashing import AddressScheme
from prefixmem_jax.memory.table import Table
from prefixmem_jax.parallel.parameters import normal
from prefixmem_jax.parallel.sharding import (
    constrain,
    first_positions,
    length_shares,
    put_positions,
    take_positions,
)
from prefixmem_jax.semantic_ids.space import SidSpace
from prefixmem_jax.semantic_ids.vocabulary import Vocabulary
from prefixmem_jax.sid_encoders.sid_encoder import SidEncoder, SidEncoderConfig


@dataclass(frozen=True)
class PrefixMemoryConfig(SidEncoderConfig):
    """PrefixMem's sizes; defaults are the paper's.

    Attributes:
      target_levels: 1-based levels to help predict: (4, 5) adds the vector at the positions of
        c_3 and c_4. Level 1, which the paper has not, is that of the next item: its vector is
        added at an item's last code, and is that of the whole SID.
      orders: N_max, the longest n-gram.
      items: n-grams of whole items, beyond the paper: the SIDs of the last k = 1..items items,
        followed by the prefix that is being written.
      heads: H, hash heads per n-gram.
      rows: T, rows in each of the orders * heads tables.
      d_mem: width of the memory vector; each row has d_mem / heads numbers.
      dtype: how rows are stored; bfloat16 rows are updated in float32 and rounded stochastically.
      address: which n-grams of the prefix are hashed, see `memory.hashing`.
      seed: fixes the hash multipliers. Tables mean nothing under other multipliers.
    """

    target_levels: tuple[PositiveInt, ...] = (4, 5)
    orders: PositiveInt = 4
    items: NonNegativeInt = 0
    heads: PositiveInt = 4
    rows: PositiveInt = 2_000_000
    d_mem: PositiveInt = 256
    dtype: DType = "float32"
    address: AddressScheme = "prefix"
    seed: Seed = 0

    @property
    def tables(self) -> int:
        """Number of tables E[n, h]."""
        return hashing.table_count(self.address, self.orders, self.heads, self.items)

    @property
    def row_width(self) -> int:
        """Numbers in a row of a table."""
        return self.d_mem // self.heads

    @property
    def reads_items(self) -> bool:
        return 1 in self.target_levels

    def check_keys(self) -> None:
        if self.d_mem % self.heads:
            raise UserError(
                f"sid_encoder.d_mem={self.d_mem} does not divide by sid_encoder.heads={self.heads}"
            )

    def check(self, space: SidSpace) -> None:
        """Raises UserError where the sizes do not fit the SIDs."""
        if not self.target_levels:
            raise UserError(
                "sid_encoder.target_levels is empty; name at least one level to predict"
            )
        for level in self.target_levels:
            if level > space.levels:
                raise UserError(
                    f"sid_encoder.target_levels={self.target_levels}: level {level} is outside "
                    f"1..{space.levels} (the SIDs have {space.levels} levels)"
                )
        longest = max(self._prefix_lengths(space))
        if self.orders > longest:
            raise UserError(
                f"sid_encoder.orders={self.orders}: the longest prefix that target_levels="
                f"{self.target_levels} uses has {longest} codes"
            )
        if self.rows >= 2**31:
            raise UserError(f"sid_encoder.rows={self.rows}; expected fewer than 2^31 in a table")

    def check_items(self, space: SidSpace) -> None:
        if self.orders < space.levels and not self.items:
            raise UserError(
                f"sid_encoder.orders={self.orders}: item_head.vectors=memory would not tell apart "
                f"SIDs that differ in one code; expected {space.levels}, or sid_encoder.items=1"
            )

    def _prefix_lengths(self, space: SidSpace) -> list[int]:
        """Codes of the prefix at the position before each target level."""
        return [level - 1 or space.levels for level in self.target_levels]

    def table(self, space: SidSpace) -> Table:
        """The array that holds every table E[n, h], and the share of addresses that batches use."""
        used = [self._distinct_addresses(space, codes) for codes in range(1, space.levels + 1)]
        looked_up = float(self.active_share(space)) * self.tables  # addresses, for a position
        # Of a whole item, and of the first codes of one that ends early.
        shares = [of / (codes * looked_up) for codes, of in enumerate(used, start=1)]
        return Table(
            self.rows,
            self.row_width,
            self.tables,
            self.dtype,
            density=shares[-1],
            most_distinct=max(shares),
            most_cut=used[-1],
        )

    def active_share(self, space: SidSpace) -> Fraction:
        """Positions that are active, as a share of those of items, which may end early: the most
        that it can be.
        """
        lengths = set(self._prefix_lengths(space))
        return max(
            Fraction(sum(length <= codes for length in lengths), codes)
            for codes in range(1, space.levels + 1)
        )

    def _distinct_addresses(self, space: SidSpace, codes: int) -> int:
        """Of one item's first codes: those of the n-grams that its active positions hash.

        With `prefix` all active positions share those of the longest.
        """
        active = [length for length in self._prefix_lengths(space) if length <= codes]
        grams = [min(length, self.orders) for length in active]
        used = {
            "prefix": max(grams, default=0),
            "suffix": sum(grams),
            "full_prefix": len(grams),
        }[self.address]
        return (used + self.items * len(grams)) * self.heads

    def multipliers(self, space: SidSpace) -> np.ndarray:
        """Of the hash, uint32 [levels, heads], then those of each of the last items."""
        return hashing.make_multipliers(self.seed, space.levels * (1 + self.items), self.heads)

    def row_meaning(self, space: SidSpace) -> dict[str, np.ndarray]:
        scheme = hashing.SCHEMES.index(self.address)
        return {
            "multipliers": self.multipliers(space),
            "layout": np.array(
                [self.orders, self.heads, self.rows, scheme] + [self.items] * (self.items > 0),
                np.int32,
            ),
        }

    def explain_row_meaning(self, name: str, saved: np.ndarray) -> str:
        if name != "layout":
            return "other hash multipliers (another sid_encoder.seed)"
        orders, heads, rows, scheme, *items = saved
        return (
            f"orders={orders} heads={heads} rows={rows} address={hashing.SCHEMES[scheme]} "
            f"items={items[0] if items else 0}"
        )

    def build(
        self, vocabulary: Vocabulary, d_model: int, output_std: float | None, rngs: nnx.Rngs
    ) -> PrefixMemory:
        return PrefixMemory(self, vocabulary, d_model, output_std, rngs=rngs)


class PrefixMemory(SidEncoder):
    """m_l = W_out @ sum over n of concat over h of E[n, h][idx[n, h]]."""

    def __init__(
        self,
        config: PrefixMemoryConfig,
        vocabulary: Vocabulary,
        d_model: int,
        output_std: float | None,
        *,
        rngs: nnx.Rngs,
    ):
        self.config = config
        self.vocabulary = vocabulary
        std = config.d_mem**-0.5 if output_std is None else output_std
        self.projection = normal(
            rngs, std, (config.heads, None), (config.row_width, None), (d_model, None)
        )

    def _levels(
        self, tokens_BS: jax.Array, segment_ids_BS: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """Length of the prefix at each position, 0 where it is not active; and its codes."""
        level_BS, codes_BSL = self.vocabulary.prefixes(tokens_BS, segment_ids_BS)
        lengths = jnp.asarray(self.config._prefix_lengths(self.vocabulary.space))
        active_BS = jnp.any(level_BS[..., None] == lengths, axis=-1)
        return jnp.where(active_BS, level_BS, 0), codes_BSL

    @property
    def reach(self) -> int:
        return self.vocabulary.levels * (1 + self.config.items) - 1

    def active(self, tokens_BS: jax.Array, segment_ids_BS: jax.Array) -> jax.Array:
        return self._levels(tokens_BS, segment_ids_BS)[0] > 0

    def looked_up(self, tokens_BS: jax.Array, segment_ids_BS: jax.Array) -> jax.Array:
        """All active positions, filled up with others: each of the devices that divide a row takes
        those of its own stretch, which may begin within an item.
        """
        level_BS, _ = self._levels(tokens_BS, segment_ids_BS)
        shares = length_shares()
        stretch = level_BS.shape[1] // shares
        most = math.ceil(self.config.active_share(self.vocabulary.space) * stretch)
        if shares > 1:
            most += len(self.config.target_levels)
        return first_positions(level_BS > 0, min(most, stretch), shares)[0]

    def addresses(
        self, tokens_BS: jax.Array, segment_ids_BS: jax.Array, last: int | None = None
    ) -> jax.Array:
        """Rows to fetch: int32 [B, P, tables], negative where it is not active."""
        level_BS, codes_BSL = self._levels(tokens_BS, segment_ids_BS)
        items = None
        if self.config.items:
            whole_BS, _ = self.vocabulary.prefixes(tokens_BS, segment_ids_BS)
            exists_BSK, codes_BSKL = self.vocabulary.last_items(
                whole_BS, codes_BSL, segment_ids_BS, self.config.items
            )
            items = exists_BSK & (level_BS > 0)[..., None], codes_BSKL
        prefixes = level_BS, codes_BSL, items
        if last is None:
            index_BP = self.looked_up(tokens_BS, segment_ids_BS)
            prefixes = jax.tree.map(lambda x: take_positions(x, index_BP), prefixes)
        else:
            prefixes = jax.tree.map(lambda x: x[:, -last:], prefixes)
        level_BP, codes_BPL, items = prefixes
        return hashing.addresses(
            codes_BPL,
            level_BP,
            self.config.multipliers(self.vocabulary.space),
            scheme=self.config.address,
            orders=self.config.orders,
            rows=self.config.rows,
            items=items,
        )

    def __call__(
        self,
        tokens_BS: jax.Array,
        segment_ids_BS: jax.Array,
        rows_BPAW: jax.Array,
        last: int | None = None,
    ) -> jax.Array:
        batch, positions, tables, width = rows_BPAW.shape
        heads = self.config.heads
        rows_BPNHW = rows_BPAW.reshape(batch, positions, tables // heads, heads, width)
        vectors_BPD = jnp.einsum("BPHW,HWD->BPD", rows_BPNHW.sum(axis=2), self.projection[...])
        if last is not None:
            return vectors_BPD
        index_BP = self.looked_up(tokens_BS, segment_ids_BS)
        vectors_BPD = constrain(vectors_BPD, "batch", None, None)
        return put_positions(vectors_BPD, index_BP, tokens_BS.shape[1])
