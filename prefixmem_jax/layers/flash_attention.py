"""Attention of whole sequences on GPUs: JAX's flash kernel in Triton, causal and within segments.

It computes the scores block by block and keeps none. Tests compare it with plain attention as
Pallas interprets it, and lower it for GPUs; it has not run on one yet (`model.attention=plain`
does without).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

BLOCK = 128  # of queries; sequences are filled up to a multiple
# Of keys, and of both in the backward pass: with heads of 128 they fit every GPU's shared memory.
SMALL_BLOCK = 64


def flash_attention(
    query_BSNH: jax.Array,
    key_BSKH: jax.Array,
    value_BSKH: jax.Array,
    segments_BS: jax.Array,
    *,
    scale: float | None,
    interpret: bool = False,
) -> jax.Array:
    """As `attention.self_attention` without a window; on one device's own arrays.

    Args:
      interpret: run it without a GPU.
    """
    # Only here: elsewhere than on GPUs nothing asks for it.
    from jax.experimental.pallas.ops.gpu import attention as gpu

    _, length, heads, size = query_BSNH.shape
    missing = -length % BLOCK
    group = heads // key_BSKH.shape[2]
    keys, values = (jnp.repeat(x, group, axis=2) for x in (key_BSKH, value_BSKH))
    filled = [
        jnp.pad(x, ((0, 0), (0, missing), (0, 0), (0, 0))) for x in (query_BSNH, keys, values)
    ]
    # What fills up is of a segment that no token has.
    segments_BS = jnp.pad(segments_BS, ((0, 0), (0, missing)), constant_values=-1)
    blocks = gpu.BlockSizes(BLOCK, *[SMALL_BLOCK] * 5)
    attended = gpu.mha(
        *filled,
        segments_BS,
        size**-0.5 if scale is None else scale,
        True,
        blocks,
        interpret=interpret,
    )
    return attended[:, :length]
