"""Attention: whole sequences by the platform's kernel, caches, and beams that share a prompt.

What a query may attend to is described by data, positions and segments, never by a mask that the
caller builds. Dimension letters: see `models.decoder`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from prefixmem_jax.layers.flash_attention import flash_attention
from prefixmem_jax.layers.splash_attention import splash_attention
from prefixmem_jax.parallel.sharding import by_heads, on_cpus, on_gpus, on_tpus

NO_WINDOW = 2**30  # further back than any position
# On a CPU, so many scores of attention at a time stay in its cache: 4 MB.
CACHED_SCORES = 2**20


class Place(NamedTuple):
    """Where tokens stand: position within their document, and the document's segment, [B, T]."""

    positions: jax.Array
    segments: jax.Array


class KeyValues(NamedTuple):
    """Keys and values of tokens, [B, T, K, H] each (with a leading [L] where of all layers)."""

    keys: jax.Array
    values: jax.Array


def visible(queries: Place, keys: Place, window: jax.Array | int) -> jax.Array:
    """Whether query s may attend to key t, [B, S, T]: causal, in its document and its window."""
    back_BST = queries.positions[:, :, None] - keys.positions[:, None]
    same_BST = queries.segments[:, :, None] == keys.segments[:, None]
    return same_BST & (back_BST >= 0) & (back_BST < window)


def self_attention(
    query_BSNH: jax.Array,
    place: Place,
    own: KeyValues,
    window: jax.Array | int,
    windows: Sequence[int],
    scale: float | None,
    longest: int = NO_WINDOW,
) -> jax.Array:
    """Attention among the tokens of whole sequences: [B, S, N, H].

    On TPUs by the splash kernel, which keeps no [S, S] array and skips what no window reaches; on
    GPUs in bfloat16 by a flash kernel, which keeps none either, and knows no window; on CPUs a few
    rows at a time, computed again by the backward pass.

    Args:
      place: positions go up by one within a segment, which stands in one piece.
      own: keys and values of the same tokens, [B, S, K, H].
      window: one of `windows`: how many positions back a query sees, itself included; may be
        traced.
      scale: of queries; None means H ** -0.5.
      longest: tokens that a segment has at most: a window as wide is none.
    """
    if on_tpus():
        kernels = [partial(splash_attention, window=one, scale=scale) for one in windows]
    elif on_gpus():
        kernels = [partial(_on_a_gpu, scale, None if one >= longest else one) for one in windows]
    else:
        local = partial(few_rows_at_a_time, partial(_attention, scale))
        return by_heads(local, (query_BSNH, *own), (place, place), jnp.asarray(window))

    def local(heads: tuple, batch: tuple, *which: jax.Array) -> jax.Array:
        operands = (*heads, *batch)
        return jax.lax.switch(which[0], kernels, *operands) if which else kernels[0](*operands)

    which = (jnp.argmax(jnp.asarray(windows) == window),) if len(windows) > 1 else ()
    heads = (query_BSNH, *own)
    return by_heads(local, heads, (place.segments,), *which, kernel=True)


def attention(
    query_BSNH: jax.Array,
    queries: Place,
    past: KeyValues,
    keys: Place,
    window: jax.Array | int,
    scale: float | None,
) -> jax.Array:
    """Grouped-query attention to anything, a cache too: [B, S, N, H].

    Args:
      past: [B, T, K, H]; `keys` says where they stand.
      window, scale: as of `self_attention`.
    """

    local = partial(_attention, scale)
    return by_heads(local, (query_BSNH, *past), (queries, keys), jnp.asarray(window))


def _on_a_gpu(
    scale: float | None,
    window: int | None,
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    segments: jax.Array,
) -> jax.Array:
    """
    Args:
      window: None for none that is nearer than a segment's start.
    """
    if window is None and query.dtype == jnp.bfloat16:
        return flash_attention(query, key, value, segments, scale=scale)
    place = Place(jnp.broadcast_to(jnp.arange(segments.shape[1]), segments.shape), segments)
    window = NO_WINDOW if window is None else window
    return _attention(scale, (query, key, value), (place, place), window)


def _attention(
    scale: float | None, heads: tuple, batch: tuple[Place, Place], window: jax.Array | int
) -> jax.Array:
    (query, key, value), (queries, keys) = heads, batch
    mask = visible(queries, keys, window)[:, None]
    return jax.nn.dot_product_attention(query, key, value, mask=mask, scale=scale)


def few_rows_at_a_time(attend: Callable, heads: tuple, batch: Any, *shared: jax.Array) -> jax.Array:
    """`attend(heads, batch, *shared)`, on CPUs of so few rows at once that their scores stay in the
    cache; the backward pass computes them again.

    Args:
      heads: queries [B, S, N, H], keys and values [B, T, K, H]; batch: arrays [B, any].
    """
    if not on_cpus():
        return attend(heads, batch, *shared)
    (rows, queries, count, _), keys = heads[0].shape, heads[1].shape[1]
    most = max(1, CACHED_SCORES // (count * queries * keys))
    pieces = next(n for n in range(-(-rows // most), rows + 1) if rows % n == 0)
    divided = jax.tree.map(lambda x: x.reshape(pieces, -1, *x.shape[1:]), (heads, batch))
    one = jax.checkpoint(attend)
    found = jax.lax.map(lambda piece: one(*piece, *shared), divided)
    return found.reshape(heads[0].shape)


def appended(own: KeyValues, new: KeyValues) -> KeyValues:
    """Each beam's own keys and values [B, S, A, K, H] and its new token's: [B, S, A + 1, K, H]."""
    return jax.tree.map(lambda old, add: jnp.concatenate([old, add[:, :, None]], axis=2), own, new)


def beam_attention(
    query_BSNH: jax.Array,
    queries: Place,
    prompt: KeyValues,
    prompt_keys: Place,
    own: KeyValues,
    window: jax.Array | int,
    scale: float | None,
) -> jax.Array:
    """One softmax over a prompt that all queries share and each query's own tokens: [B, S, N, H].

    Args:
      prompt: [B, T, K, H], read once for all queries (the beams of a user).
      own: the last A tokens of each beam, the query's token last, [B, S, A, K, H].
    """
    batch, length, heads, size = query_BSNH.shape
    kv_heads, count = own.keys.shape[3], own.keys.shape[2]
    scale = size**-0.5 if scale is None else scale
    query = query_BSNH.reshape(batch, length, kv_heads, heads // kv_heads, size)
    wide = {"preferred_element_type": jnp.float32}
    to_prompt = jnp.einsum("BSKGH,BTKH->BKGST", query, prompt.keys, **wide) * scale
    query32, keys32 = query.astype(jnp.float32), own.keys.astype(jnp.float32)
    to_own = (query32[:, :, None] * keys32[:, :, :, :, None]).sum(-1) * scale
    to_own = jnp.moveaxis(to_own, (1, 2), (3, 4))  # [B, K, G, S, A]
    lowest = jnp.finfo(jnp.float32).min
    near_A = count - 1 - jnp.arange(count) < window
    logits = jnp.concatenate(
        [
            jnp.where(visible(queries, prompt_keys, window)[:, None, None], to_prompt, lowest),
            jnp.where(near_A, to_own, lowest),
        ],
        axis=-1,
    )
    weights = jax.nn.softmax(logits, axis=-1).astype(query.dtype)
    shared = prompt.keys.shape[1]
    attended = jnp.einsum("BKGST,BTKH->BSKGH", weights[..., :shared], prompt.values)
    own_weights = jnp.moveaxis(weights[..., shared:], (3, 4), (1, 2))  # [B, S, A, K, G]
    attended += (own_weights[..., None] * own.values[:, :, :, :, None]).sum(axis=2)
    return attended.reshape(batch, length, heads, size)
