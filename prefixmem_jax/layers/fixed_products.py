"""What TPUs do faster as a product with a constant than by moving numbers about within a vector.

Such a product goes along with those around it. `training.flops` leaves them out.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

SCOPE = "fixed_product"


@jax.named_scope(SCOPE)
def mean_by_product(x: jax.Array) -> jax.Array:
    """The last axis' mean at each of its places, float32.

    A sum along a vector, and its way back to each of the vector's places, cost as much on a v6e as
    the projection to heads.
    """
    size = x.shape[-1]
    shares = jnp.full((size, size), 1 / size, jnp.float32)
    return jnp.einsum("...H,HG->...G", x, shares, precision="high")


@jax.named_scope(SCOPE)
def halves_swapped(x: jax.Array) -> jax.Array:
    """The last axis' second half and then its first, float32, exactly.

    Half a head is less than a TPU's vector: cut and put together it takes half a dozen passes over
    memory.
    """
    size = x.shape[-1]
    swap_HG = jnp.asarray(np.roll(np.eye(size), size // 2, axis=1), x.dtype)
    exact = {"precision": "highest", "preferred_element_type": jnp.float32}
    return jnp.einsum("...H,HG->...G", x, swap_HG, **exact)
