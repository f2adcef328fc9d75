"""Rows stored in bfloat16: rounded up or down at random, so that small updates add up."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def round_stochastically(values: jax.Array, ids: jax.Array, key: jax.Array) -> jax.Array:
    """float32 [K, width] to bfloat16, up or down at random so that the mean is kept.

    Plain rounding would lose every update smaller than 1/256 of the number. The random bits
    depend on the row's number among all [K], modulo 2^32, and the key alone, so that any number of
    devices rounds alike.
    """

    def bits(row: jax.Array) -> jax.Array:
        return jax.random.bits(jax.random.fold_in(key, row), values.shape[1:], jnp.uint16)

    raw = jax.lax.bitcast_convert_type(values, jnp.uint32) + jax.vmap(bits)(ids).astype(jnp.uint32)
    return jax.lax.bitcast_convert_type((raw >> 16).astype(jnp.uint16), jnp.bfloat16)
