"""PrefixMem: the encoder that turns a SID prefix into a vector (paper, Section "Method")."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from prefixmem_jax.config import PrefixMemoryConfig
from prefixmem_jax.errors import UserError
from prefixmem_jax.memory import hashing
from prefixmem_jax.memory.table import Table
from prefixmem_jax.semantic_ids.space import SidSpace


def check_encoder(config: PrefixMemoryConfig, space: SidSpace) -> None:
    """Raises UserError where the encoder's sizes do not fit the SIDs."""
    if not config.target_levels:
        raise UserError("encoder.target_levels is empty; name at least one level to predict")
    for level in config.target_levels:
        if not 2 <= level <= space.levels:
            raise UserError(
                f"encoder.target_levels={config.target_levels}: level {level} is outside "
                f"2..{space.levels} (the SIDs have {space.levels} levels)"
            )
    longest = max(config.target_levels) - 1
    if config.orders > longest:
        raise UserError(
            f"encoder.orders={config.orders}: the longest prefix that target_levels="
            f"{config.target_levels} uses has {longest} codes"
        )
    if make_table(config, space).padded_rows >= 2**31:
        raise UserError(
            f"encoder.rows={config.rows}: {tables_of(config)} tables exceed 2^31 rows in all"
        )


def tables_of(config: PrefixMemoryConfig) -> int:
    """Number of tables E[n, h]."""
    return hashing.table_count(config.address, config.orders, config.heads)


def make_hash(config: PrefixMemoryConfig, space: SidSpace) -> dict[str, np.ndarray]:
    """What the rows' meaning depends on; saved beside them and compared on restore."""
    scheme = hashing.SCHEMES.index(config.address)
    return {
        "multipliers": hashing.make_multipliers(config.seed, space.levels, config.heads),
        "layout": np.array([config.orders, config.heads, config.rows, scheme], np.int32),
    }


def make_table(config: PrefixMemoryConfig, space: SidSpace) -> Table:
    """The array that holds every table E[n, h], and the share of addresses that batches use.

    Of one SID's levels * tables addresses, those of the n-grams that its active positions hash
    are used; with `prefix`, all active positions share those of the longest.
    """
    tables = tables_of(config)
    grams = [min(level - 1, config.orders) for level in config.target_levels]
    used = {"prefix": max(grams), "suffix": sum(grams), "full_prefix": len(grams)}[config.address]
    density = used * config.heads / (space.levels * tables)
    return Table(config.rows * tables, config.d_mem // config.heads, config.dtype, density)


class PrefixMemory(nnx.Module):
    """m_l = W_out @ sum over n of concat over h of E[n, h][idx[n, h]].

    The rows live outside the module, in the sharded array that `table` describes: `addresses`
    says which rows to read, the caller fetches them, `__call__` makes vectors of them. Training,
    prefill and cached decoding all go this way.
    """

    def __init__(
        self,
        config: PrefixMemoryConfig,
        space: SidSpace,
        d_model: int,
        projection_std: float,
        *,
        rngs: nnx.Rngs,
    ):
        self.config = config
        self.space = space
        self.table = make_table(config, space)
        shape = (config.heads, config.d_mem // config.heads, d_model)
        self.projection = nnx.Param(
            projection_std * jax.random.normal(rngs.params(), shape, jnp.float32)
        )

    def addresses(self, tokens_BS: jax.Array, segment_ids_BS: jax.Array) -> jax.Array:
        """Rows to read: int32 [B, S, tables], negative where the encoder is not active."""
        level_BS, codes_BSL = self.space.prefixes(tokens_BS, segment_ids_BS)
        targets = jnp.asarray(self.config.target_levels)
        active_BS = jnp.any(level_BS[..., None] + 1 == targets, axis=-1)
        config = self.config
        return hashing.addresses(
            codes_BSL,
            jnp.where(active_BS, level_BS, 0),
            hashing.make_multipliers(config.seed, self.space.levels, config.heads),
            scheme=config.address,
            orders=config.orders,
            rows=config.rows,
        )

    def __call__(self, rows_BSAW: jax.Array) -> jax.Array:
        """Memory vectors float32 [B, S, d_model], zero where the encoder is not active.

        Args:
          rows_BSAW: the rows at `addresses`, zero where there was none.
        """
        batch, length, tables, width = rows_BSAW.shape
        heads = self.config.heads
        rows_BSNHW = rows_BSAW.reshape(batch, length, tables // heads, heads, width)
        return jnp.einsum("BSHW,HWD->BSD", rows_BSNHW.sum(axis=2), self.projection[...])
