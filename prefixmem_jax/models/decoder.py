"""One decoder-only transformer: Qwen3, Llama 3 and Gemma 3 at any size, by configuration.

Pre-norm RMSNorm, rotary embeddings (rotate-half), grouped-query attention with optional q/k
norm and sliding windows, gated feed-forward, optional tying of the output head. Layers are stacked
along a leading axis and run by `lax.scan`. Dimension letters: B batch, S query positions, T key
positions, D model, N query heads, K key/value heads, H head size, F feed-forward, L layers,
V vocabulary.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from prefixmem_jax.config import DecoderConfig, RopeScalingConfig
from prefixmem_jax.parallel.sharding import by_heads, constrain, einsum, gather_over_fsdp, take

# The axis of tokens in each table of them.
TOKEN_AXIS = {"embedding": 0, "head": 1}

WHOLE = ("batch", None, None)  # activations [B, S, D]: on every tensor-parallel device alike


class Cache(NamedTuple):
    """Keys and values of earlier positions, [L, B, T, K, H] each."""

    keys: jax.Array
    values: jax.Array


class Branches(NamedTuple):
    """Queries that share a prompt and go on in different directions, as beams do.

    Each query attends to the prompt (the cache) and to tokens of its own branch, among those that
    came after it: its ancestors and itself.

    Attributes:
      cache: keys and values of earlier tokens after the prompt, [L, B, G, K, H] each; G may be 0.
      ancestors_BSA: int32, places of query s's branch among those G tokens and, from G on, the
        queries themselves.
      positions_BSA: positions of these tokens.
    """

    cache: Cache
    ancestors_BSA: jax.Array
    positions_BSA: jax.Array


def _normal(rngs: nnx.Rngs, shape: tuple[int, ...], std: float) -> nnx.Param:
    return nnx.Param(std * jax.random.normal(rngs.params(), shape, jnp.float32))


class RMSNorm(nnx.Module):
    def __init__(self, size: int, config: DecoderConfig):
        self.offset = 1.0 if config.norm_plus_one else 0.0
        self.scale = nnx.Param(jnp.full(size, 1.0 - self.offset, jnp.float32))
        self.epsilon = config.norm_epsilon

    def __call__(self, x: jax.Array) -> jax.Array:
        x32 = x.astype(jnp.float32)
        normed = x32 * jax.lax.rsqrt(jnp.mean(x32**2, axis=-1, keepdims=True) + self.epsilon)
        return (normed * (self.offset + self.scale[...])).astype(x.dtype)


def rope_frequencies(
    head_dim: int, base: float, scaling: RopeScalingConfig | None = None
) -> np.ndarray:
    """Radians per position of each pair of a head's numbers, float32 [head_dim / 2]."""
    frequency = base ** (-np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    if scaling is None:
        return frequency.astype(np.float32)
    stretched = frequency / scaling.factor
    if scaling.kind == "linear":
        return stretched.astype(np.float32)
    turns = scaling.original_length * frequency / (2 * np.pi)  # within the original context
    low, high = scaling.low_frequency_factor, scaling.high_frequency_factor
    kept = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return (kept * frequency + (1 - kept) * stretched).astype(np.float32)


def rotate(x_BSNH: jax.Array, positions_BS: jax.Array, frequency_H: jax.Array) -> jax.Array:
    """Rotary position embedding, rotate-half form, computed in float32."""
    angle_BSH = positions_BS[..., None].astype(jnp.float32) * frequency_H
    cos, sin = jnp.cos(angle_BSH)[:, :, None], jnp.sin(angle_BSH)[:, :, None]
    first, second = jnp.split(x_BSNH.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.astype(x_BSNH.dtype)


class Positions(NamedTuple):
    """Where a layer's queries stand and what they may attend to.

    Attributes:
      query_BS: positions of the queries.
      mask_BST: True where query s may attend to key t.
      frequency_H: rotary frequencies.
      branch_mask_BSA: True where query s may attend to its branch's token a; None without branches.
    """

    query_BS: jax.Array
    mask_BST: jax.Array
    frequency_H: jax.Array
    branch_mask_BSA: jax.Array | None = None


class Past(NamedTuple):
    """What one layer has kept: keys and values [B, T, K, H], where to write, and branches."""

    keys: jax.Array | None
    values: jax.Array | None
    write_at: jax.Array | int
    branches: Branches | None


def attend_to_branches(
    query_BSNH: jax.Array,
    key_BSKH: jax.Array,
    value_BSKH: jax.Array,
    past: Past,
    positions: Positions,
    scale: float | None,
) -> jax.Array:
    """One softmax over the shared prompt and each query's own branch: [B, S, N, H].

    The prompt's keys are read once for all queries, the branch's by index; nothing is reordered.
    """
    batch, length, heads, size = query_BSNH.shape
    kv_heads = key_BSKH.shape[2]
    scale = size**-0.5 if scale is None else scale
    query = query_BSNH.reshape(batch, length, kv_heads, heads // kv_heads, size)
    own_key, own_value = (
        jax.vmap(lambda tokens, places: tokens[places])(
            jnp.concatenate([old, new], axis=1), past.branches.ancestors_BSA
        )
        for old, new in zip(past.branches.cache, (key_BSKH, value_BSKH), strict=True)
    )  # [B, S, A, K, H]
    wide = {"preferred_element_type": jnp.float32}
    shared = jnp.einsum("BSKGH,BTKH->BKGST", query, past.keys, **wide) * scale
    own = (query[:, :, None] * own_key[:, :, :, :, None]).astype(jnp.float32).sum(-1) * scale
    own = jnp.moveaxis(own, (1, 2), (3, 4))  # [B, K, G, S, A]
    lowest = jnp.finfo(jnp.float32).min
    logits = jnp.concatenate(
        [
            jnp.where(positions.mask_BST[:, None, None], shared, lowest),
            jnp.where(positions.branch_mask_BSA[:, None, None], own, lowest),
        ],
        axis=-1,
    )
    weights = jax.nn.softmax(logits, axis=-1).astype(query.dtype)
    prompt = past.keys.shape[1]
    attended = jnp.einsum("BKGST,BTKH->BSKGH", weights[..., :prompt], past.values)
    own_weights = jnp.moveaxis(weights[..., prompt:], (3, 4), (1, 2))  # [B, S, A, K, G]
    attended += (own_weights[..., None] * own_value[:, :, :, :, None]).sum(axis=2)
    return attended.reshape(batch, length, heads, size)


_ACTIVATIONS = {"silu": jax.nn.silu, "gelu_tanh": partial(jax.nn.gelu, approximate=True)}


class Layer(nnx.Module):
    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs):
        d, h, std = config.d_model, config.head_dim, config.init_std
        self.attention_norm = RMSNorm(d, config)
        self.query = _normal(rngs, (d, config.query_heads, h), std)
        self.key = _normal(rngs, (d, config.kv_heads, h), std)
        self.value = _normal(rngs, (d, config.kv_heads, h), std)
        self.output = _normal(rngs, (config.query_heads, h, d), std)
        if config.qk_norm:
            self.query_norm = RMSNorm(h, config)
            self.key_norm = RMSNorm(h, config)
        self.mlp_norm = RMSNorm(d, config)
        if config.post_norms:
            self.attention_post_norm = RMSNorm(d, config)
            self.mlp_post_norm = RMSNorm(d, config)
        self.gate = _normal(rngs, (d, config.d_ff), std)
        self.up = _normal(rngs, (d, config.d_ff), std)
        self.down = _normal(rngs, (config.d_ff, d), std)
        self.config = config

    def __call__(
        self,
        x_BSD: jax.Array,
        positions: Positions,
        past: Past,
    ) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        """Returns the layer's output and the keys and values [B, T, K, H] to keep."""
        attended, kept = self._attend(self.attention_norm(x_BSD), positions, past)
        if self.config.post_norms:
            attended = self.attention_post_norm(attended)
        x_BSD = x_BSD + attended
        y = self._feed_forward(self.mlp_norm(x_BSD))
        if self.config.post_norms:
            y = self.mlp_post_norm(y)
        return x_BSD + y, kept

    @jax.named_scope("attention")
    def _attend(
        self,
        x_BSD: jax.Array,
        positions: Positions,
        past: Past,
    ) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        config, dtype, heads = self.config, x_BSD.dtype, ("batch", None, "heads", None)
        query, key, value = (
            einsum(
                "BSD,DNH->BSNH",
                x_BSD,
                gather_over_fsdp(w[...], dtype, None, "heads", None),
                out=heads,
            )
            for w in (self.query, self.key, self.value)
        )
        if config.qk_norm:
            query, key = self.query_norm(query), self.key_norm(key)
        query = rotate(query, positions.query_BS, positions.frequency_H)
        key = rotate(key, positions.query_BS, positions.frequency_H)
        kept = (key, value)
        if past.branches is not None:
            attended = attend_to_branches(query, key, value, past, positions, config.query_scale)
        else:
            if past.keys is not None:
                kept = key, value = tuple(
                    jax.lax.dynamic_update_slice_in_dim(old, new, past.write_at, axis=1)
                    for old, new in ((past.keys, key), (past.values, value))
                )

            def attention(query: jax.Array, key: jax.Array, value: jax.Array, mask: jax.Array):
                return jax.nn.dot_product_attention(
                    query, key, value, mask=mask[:, None], scale=config.query_scale
                )

            attended = by_heads(attention, query, key, value, positions.mask_BST)
        output = gather_over_fsdp(self.output[...], dtype, "heads", None, None)
        return einsum("BSNH,NHD->BSD", attended, output, out=WHOLE), kept

    @jax.named_scope("mlp")
    def _feed_forward(self, x_BSD: jax.Array) -> jax.Array:
        dtype = x_BSD.dtype
        gate, up = (
            einsum(
                "BSD,DF->BSF",
                x_BSD,
                gather_over_fsdp(w[...], dtype, None, "feed_forward"),
                out=("batch", None, "feed_forward"),
            )
            for w in (self.gate, self.up)
        )
        down = gather_over_fsdp(self.down[...], dtype, "feed_forward", None)
        activated = _ACTIVATIONS[self.config.activation](gate)
        return einsum("BSF,FD->BSD", activated * up, down, out=WHOLE)


class Decoder(nnx.Module):
    """Token embeddings, the stacked layers, the final norm and the head."""

    def __init__(self, config: DecoderConfig, vocabulary_size: int, *, rngs: nnx.Rngs):
        self.config = config
        self.embedding = _normal(rngs, (vocabulary_size, config.d_model), config.init_std)
        self.layers = nnx.vmap(lambda r: Layer(config, rngs=r))(rngs.fork(split=config.layers))
        self.final_norm = RMSNorm(config.d_model, config)
        if not config.tied_embeddings:
            self.head = _normal(rngs, (config.d_model, vocabulary_size), config.init_std)

    @jax.named_scope("embedding")
    def embed(self, tokens_BS: jax.Array) -> jax.Array:
        """Token embeddings [B, S, D] in the compute dtype."""
        table = gather_over_fsdp(self.embedding[...], self.config.compute_dtype, None, "embedded")
        found = take(table, tokens_BS, "batch", None, "embedded")
        found = constrain(found, *WHOLE)
        if self.config.scale_embedding:
            found *= jnp.asarray(self.config.d_model**0.5, found.dtype)
        return found

    def __call__(
        self,
        x_BSD: jax.Array,
        positions_BS: jax.Array,
        mask_BST: jax.Array,
        cache: Cache | None = None,
        write_at: jax.Array | int = 0,
        key_positions_BT: jax.Array | None = None,
        branches: Branches | None = None,
    ) -> tuple[jax.Array, Cache]:
        """Runs the layers on embedded inputs.

        Args:
          mask_BST: True where query position s may attend to key position t.
          cache: keys and values with room for T positions; this call writes its S positions at
            `write_at`. Without one, T = S.
          key_positions_BT: positions of the cache's keys; needed with a cache by layers that slide.
          branches: the queries go on from the cache, which is only read, in branches.

        Returns:
          Hidden states after the final norm [B, S, D], and the keys and values [L, B, T, K, H];
          with branches, those of these S positions.
        """

        config = self.config
        everywhere = Positions(
            positions_BS,
            mask_BST,
            jnp.asarray(rope_frequencies(config.head_dim, config.rope_base, config.rope_scaling)),
            None if branches is None else jnp.ones(branches.ancestors_BSA.shape, bool),
        )
        slides_L = jnp.isin(jnp.arange(config.layers), jnp.array(config.sliding_layers, int))
        if config.sliding_layers:
            keys = positions_BS if key_positions_BT is None else key_positions_BT
            back = positions_BS[:, :, None]
            local = Positions(
                positions_BS,
                mask_BST & (back - keys[:, None, :] < config.sliding_window),
                jnp.asarray(rope_frequencies(config.head_dim, config.sliding_rope_base)),
                None if branches is None else back - branches.positions_BSA < config.sliding_window,
            )

        def body(x: jax.Array, one: tuple) -> tuple:
            layer, (kept, branch_cache), slides = one
            positions = everywhere
            if config.sliding_layers:
                positions = jax.tree.map(partial(jnp.where, slides), local, everywhere)
            own = None if branches is None else branches._replace(cache=branch_cache)
            return layer(x, positions, Past(*(kept or (None, None)), write_at, own))

        if config.remat:
            body = jax.checkpoint(body)
        past = (cache, None if branches is None else branches.cache)
        x_BSD, kept = jax.lax.scan(body, x_BSD, (self.layers, past, slides_L))
        return self.final_norm(x_BSD), Cache(*kept)

    @jax.named_scope("head")
    def logits(self, hidden_BSD: jax.Array, first: int = 0, stop: int | None = None) -> jax.Array:
        """Float32 logits [B, S, V] of tokens first..stop-1 (default: the whole vocabulary)."""
        dtype = hidden_BSD.dtype
        if self.config.tied_embeddings:
            weight = gather_over_fsdp(self.embedding[...], dtype, "vocabulary", None).T
        else:
            weight = gather_over_fsdp(self.head[...], dtype, None, "vocabulary")
        if first != 0 or stop is not None:
            weight = weight[:, first:stop]
        logits_BSV = einsum(
            "BSD,DV->BSV",
            hidden_BSD,
            weight,
            out=("batch", None, "vocabulary"),
            preferred_element_type=jnp.float32,
        )
        cap = self.config.logit_softcap
        return logits_BSV if cap is None else cap * jnp.tanh(logits_BSV / cap)


def causal_mask(segment_ids_BS: jax.Array) -> jax.Array:
    """Attention within each packed document, to itself and earlier positions: [B, S, S]."""
    length = segment_ids_BS.shape[1]
    causal = jnp.tril(jnp.ones((length, length), bool))
    return causal & (segment_ids_BS[:, :, None] == segment_ids_BS[:, None, :])
