"""Attention of whole sequences on TPUs: JAX's splash kernel, causal, within segments and a window.

It computes the scores block by block on the chip, and leaves out blocks that no window reaches.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

# Sequences are filled up to a multiple of the smallest block, and cut into the largest that divide
# them.
BLOCKS = (512, 256, 128)
# What remat policies call the result.
ATTENDED = "attended"


def splash_attention(
    query_BSNH: jax.Array,
    key_BSKH: jax.Array,
    value_BSKH: jax.Array,
    segments_BS: jax.Array,
    *,
    window: int,
    scale: float | None,
    interpret: bool = False,
) -> jax.Array:
    """As `attention.self_attention` with one window; on one device's own arrays.

    Args:
      interpret: run it without a TPU.
    """
    rows, length = segments_BS.shape
    together = BLOCKS[-1] // math.gcd(BLOCKS[-1], length)
    if rows % together == 0:  # end to end they fill whole blocks; they are other segments
        window = min(window, length)
        segments_BS = segments_BS * together + jnp.arange(rows)[:, None] % together
    else:
        together = 1

    def laid(x: jax.Array) -> jax.Array:
        return x.reshape(rows // together, together * length, *x.shape[2:])

    missing = -(together * length) % BLOCKS[-1]
    # What fills up is of a segment that no token has.
    segments_BS = jnp.pad(laid(segments_BS), ((0, 0), (0, missing)), constant_values=-1)
    scaled = query_BSNH * (query_BSNH.shape[-1] ** -0.5 if scale is None else scale)
    by_head = [
        jnp.pad(jnp.swapaxes(laid(x), 1, 2), ((0, 0), (0, 0), (0, missing), (0, 0)))
        for x in (scaled, key_BSKH, value_BSKH)
    ]
    kernel = _kernel(segments_BS.shape[1], query_BSNH.shape[2], window, interpret)
    attended = jax.vmap(kernel)(*by_head, segments_BS)
    return jnp.swapaxes(attended[:, :, : together * length], 1, 2).reshape(query_BSNH.shape)


def _kernel(length: int, heads: int, window: int, interpret: bool) -> Callable[..., jax.Array]:
    """Attention of one sequence's queries, keys and values [heads, S, H] and segments [S]."""
    # Only here: elsewhere than on TPUs nothing asks for it.
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    shape = (length, length)
    if window >= length:
        mask = splash.CausalMask(shape)
    else:
        mask = splash.LocalMask(shape, (window - 1, 0), 0)
    block = next(size for size in BLOCKS if length % size == 0)
    sizes = splash.BlockSizes(
        block_q=block,
        block_kv=block,
        block_kv_compute=block,
        block_q_dkv=block,
        block_kv_dkv=block,
        block_kv_dkv_compute=block,
        block_q_dq=block,  # of a kernel of its own: fused, each block of keys writes all queries'
        block_kv_dq=block,
    )
    kernel = splash.make_splash_mha(
        splash.MultiHeadMask([mask] * heads),
        block_sizes=sizes,
        head_shards=1,
        q_seq_shards=1,
        residual_checkpoint_name=ATTENDED,
        interpret=interpret,
    )
    return lambda q, k, v, segments: kernel(q, k, v, splash.SegmentIds(segments, segments))
