"""Attention whose logits have a learnt bias by how far apart two tokens stand (T5's positions)."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from prefixmem_jax.layers.attention import KeyValues, Place, few_rows_at_a_time
from prefixmem_jax.parallel.sharding import by_heads

BUCKETS = 32
FAR = 128  # from here on all distances are one bucket


def bucket(ahead: np.ndarray, both_ways: bool) -> np.ndarray:
    """The bucket, int32 below `BUCKETS`, of how far a key stands ahead of its query (Raffel et al.
    2020, "Exploring the Limits of Transfer Learning", section 2.1).

    Small distances have a bucket each, larger ones share them by logarithm, up to `FAR`.

    Args:
      both_ways: keys ahead and behind have half of the buckets each; otherwise all are for those
        behind, and a key ahead counts as no distance.
    """
    ahead = np.asarray(ahead, np.int64)
    count = BUCKETS // 2 if both_ways else BUCKETS
    first = np.where(ahead > 0, count, 0) if both_ways else 0
    distance = np.abs(ahead) if both_ways else np.maximum(-ahead, 0)
    exact = count // 2
    spread = np.log(np.maximum(distance, 1) / exact) / np.log(FAR / exact)
    shared = np.minimum(exact + (spread * (count - exact)).astype(np.int64), count - 1)
    return (first + np.where(distance < exact, distance, shared)).astype(np.int32)


def bias_between(bias_UN: jax.Array, queries: int, keys: int, both_ways: bool) -> jax.Array:
    """Bias [N, queries, keys] of tokens by their index.

    Within a document, which stands in one piece, indices are as far apart as positions.

    Args:
      bias_UN: by bucket and head.
    """
    ahead = np.arange(keys) - np.arange(queries)[:, None]
    return jnp.moveaxis(bias_UN[bucket(ahead, both_ways)], -1, 0)


def relative_attention(
    query_BSNH: jax.Array,
    place: Place,
    own: KeyValues,
    bias_NSS: jax.Array,
    causal: bool,
    scale: float | None,
) -> jax.Array:
    """Attention among the tokens of whole sequences, each within its segment: [B, S, N, H].

    Args:
      own: keys and values of the same tokens, [B, S, K, H].
      causal: not to later positions.
      scale: of queries; None means H ** -0.5.
    """

    def local(heads: tuple, batch: tuple, bias: jax.Array) -> jax.Array:
        (query, key, value), (positions, segments) = heads, batch
        mask_BST = segments[:, :, None] == segments[:, None]
        if causal:
            mask_BST &= positions[:, :, None] >= positions[:, None]
        return jax.nn.dot_product_attention(
            query, key, value, bias=bias[None], mask=mask_BST[:, None], scale=scale
        )

    few = partial(few_rows_at_a_time, local)
    return by_heads(few, (query_BSNH, *own), tuple(place), by_head=(bias_NSS,))


def own_attention(
    query_BSNH: jax.Array, own: KeyValues, bias_NA: jax.Array, scale: float | None
) -> jax.Array:
    """Attention of each query to tokens of its own: [B, S, N, H].

    Args:
      own: [B, S, A, K, H].
      bias_NA: by head and token.
    """
    batch, length, heads, size = query_BSNH.shape
    kv_heads = own.keys.shape[3]
    scale = size**-0.5 if scale is None else scale
    query = query_BSNH.reshape(batch, length, kv_heads, heads // kv_heads, size)
    wide = {"preferred_element_type": jnp.float32}
    logits = jnp.einsum("BSKGH,BSAKH->BSKGA", query, own.keys, **wide) * scale
    logits += bias_NA.astype(jnp.float32).reshape(kv_heads, -1, bias_NA.shape[-1])
    weights = jax.nn.softmax(logits, axis=-1).astype(query.dtype)
    attended = jnp.einsum("BSKGA,BSAKH->BSKGH", weights, own.values)
    return attended.reshape(batch, length, heads, size)
