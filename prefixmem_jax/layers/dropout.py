"""Dropout whose mask depends on a key and the place alone, so that any mesh draws it alike."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from prefixmem_jax.parallel.sharding import random_bits


@jax.named_scope("dropout")
def dropout(x: jax.Array, rate: float, key: jax.Array | None, *logical: str | None) -> jax.Array:
    """Numbers set to zero with this probability, rounded to 1/256; the others scaled up for it.

    Args:
      key: None, where nothing may be random, returns x.
      logical: axes of x; the last one is not sharded.
    """
    dropped = min(round(256 * rate), 255)
    if key is None or dropped == 0:
        return x
    # A byte decides on a number, since drawing is what it costs.
    *shape, size = x.shape
    words = random_bits(key, (*shape, -(-size // 4)), *logical)
    drawn = jax.lax.bitcast_convert_type(words, jnp.uint8).reshape(*shape, -1)[..., :size]
    kept = jnp.asarray(256 / (256 - dropped), x.dtype)
    return jnp.where(drawn >= dropped, x * kept, 0)
