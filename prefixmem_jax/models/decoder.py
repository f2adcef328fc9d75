"""One decoder-only transformer: Qwen3's architecture at any size.

Pre-norm RMSNorm, rotary embeddings (rotate-half), grouped-query attention with optional q/k
norm, SwiGLU, optional tying of the output head. Layers are stacked along a leading axis and run
by `lax.scan`. Dimension letters: B batch, S query positions, T key positions, D model, N query
heads, K key/value heads, H head size, F feed-forward, L layers, V vocabulary.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from prefixmem_jax.config import DecoderConfig
from prefixmem_jax.parallel.sharding import by_heads, constrain, einsum, gather_over_fsdp, take

WHOLE = ("batch", None, None)  # activations [B, S, D]: on every tensor-parallel device alike


class Cache(NamedTuple):
    """Keys and values of earlier positions, [L, B, T, K, H] each."""

    keys: jax.Array
    values: jax.Array


def _normal(rngs: nnx.Rngs, shape: tuple[int, ...], std: float) -> nnx.Param:
    return nnx.Param(std * jax.random.normal(rngs.params(), shape, jnp.float32))


class RMSNorm(nnx.Module):
    def __init__(self, size: int, epsilon: float):
        self.scale = nnx.Param(jnp.ones(size, jnp.float32))
        self.epsilon = epsilon

    def __call__(self, x: jax.Array) -> jax.Array:
        x32 = x.astype(jnp.float32)
        normed = x32 * jax.lax.rsqrt(jnp.mean(x32**2, axis=-1, keepdims=True) + self.epsilon)
        return (normed * self.scale[...]).astype(x.dtype)


def rotate(x_BSNH: jax.Array, positions_BS: jax.Array, base: float) -> jax.Array:
    """Rotary position embedding, rotate-half form, computed in float32."""
    half = x_BSNH.shape[-1] // 2
    frequency = base ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angle_BSH = positions_BS[..., None].astype(jnp.float32) * frequency
    cos, sin = jnp.cos(angle_BSH)[:, :, None], jnp.sin(angle_BSH)[:, :, None]
    first, second = jnp.split(x_BSNH.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.astype(x_BSNH.dtype)


def _attention(query: jax.Array, key: jax.Array, value: jax.Array, mask: jax.Array) -> jax.Array:
    return jax.nn.dot_product_attention(query, key, value, mask=mask[:, None])


class Layer(nnx.Module):
    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs):
        d, h, std = config.d_model, config.head_dim, config.init_std
        self.attention_norm = RMSNorm(d, config.norm_epsilon)
        self.query = _normal(rngs, (d, config.query_heads, h), std)
        self.key = _normal(rngs, (d, config.kv_heads, h), std)
        self.value = _normal(rngs, (d, config.kv_heads, h), std)
        self.output = _normal(rngs, (config.query_heads, h, d), std)
        if config.qk_norm:
            self.query_norm = RMSNorm(h, config.norm_epsilon)
            self.key_norm = RMSNorm(h, config.norm_epsilon)
        self.mlp_norm = RMSNorm(d, config.norm_epsilon)
        self.gate = _normal(rngs, (d, config.d_ff), std)
        self.up = _normal(rngs, (d, config.d_ff), std)
        self.down = _normal(rngs, (config.d_ff, d), std)
        self.config = config

    def __call__(
        self,
        x_BSD: jax.Array,
        positions_BS: jax.Array,
        mask_BST: jax.Array,
        past: tuple[jax.Array, jax.Array] | None,
        write_at: int,
    ) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        """Returns the layer's output and the keys and values [B, T, K, H] it attended to."""
        x_BSD, kept = self._attend(x_BSD, positions_BS, mask_BST, past, write_at)
        return self._feed_forward(x_BSD), kept

    @jax.named_scope("attention")
    def _attend(
        self,
        x_BSD: jax.Array,
        positions_BS: jax.Array,
        mask_BST: jax.Array,
        past: tuple[jax.Array, jax.Array] | None,
        write_at: int,
    ) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        dtype, heads = x_BSD.dtype, ("batch", None, "heads", None)
        y = self.attention_norm(x_BSD)
        query, key, value = (
            einsum(
                "BSD,DNH->BSNH", y, gather_over_fsdp(w[...], dtype, None, "heads", None), out=heads
            )
            for w in (self.query, self.key, self.value)
        )
        if self.config.qk_norm:
            query, key = self.query_norm(query), self.key_norm(key)
        query = rotate(query, positions_BS, self.config.rope_base)
        key = rotate(key, positions_BS, self.config.rope_base)
        if past is not None:
            key = jax.lax.dynamic_update_slice_in_dim(past[0], key, write_at, axis=1)
            value = jax.lax.dynamic_update_slice_in_dim(past[1], value, write_at, axis=1)
        attended = by_heads(_attention, query, key, value, mask_BST)
        output = gather_over_fsdp(self.output[...], dtype, "heads", None, None)
        return x_BSD + einsum("BSNH,NHD->BSD", attended, output, out=WHOLE), (key, value)

    @jax.named_scope("mlp")
    def _feed_forward(self, x_BSD: jax.Array) -> jax.Array:
        dtype = x_BSD.dtype
        y = self.mlp_norm(x_BSD)
        gate, up = (
            einsum(
                "BSD,DF->BSF",
                y,
                gather_over_fsdp(w[...], dtype, None, "feed_forward"),
                out=("batch", None, "feed_forward"),
            )
            for w in (self.gate, self.up)
        )
        down = gather_over_fsdp(self.down[...], dtype, "feed_forward", None)
        return x_BSD + einsum("BSF,FD->BSD", jax.nn.silu(gate) * up, down, out=WHOLE)


class Decoder(nnx.Module):
    """Token embeddings, the stacked layers, the final norm and the head."""

    def __init__(self, config: DecoderConfig, vocabulary_size: int, *, rngs: nnx.Rngs):
        self.config = config
        self.embedding = _normal(rngs, (vocabulary_size, config.d_model), config.init_std)
        self.layers = nnx.vmap(lambda r: Layer(config, rngs=r))(rngs.fork(split=config.layers))
        self.final_norm = RMSNorm(config.d_model, config.norm_epsilon)
        if not config.tied_embeddings:
            self.head = _normal(rngs, (config.d_model, vocabulary_size), config.init_std)

    @jax.named_scope("embedding")
    def embed(self, tokens_BS: jax.Array) -> jax.Array:
        """Token embeddings [B, S, D] in the compute dtype."""
        table = gather_over_fsdp(self.embedding[...], self.config.compute_dtype, None, "embedded")
        found = take(table, tokens_BS, "batch", None, "embedded")
        return constrain(found, *WHOLE)

    def __call__(
        self,
        x_BSD: jax.Array,
        positions_BS: jax.Array,
        mask_BST: jax.Array,
        cache: Cache | None = None,
        write_at: int = 0,
    ) -> tuple[jax.Array, Cache]:
        """Runs the layers on embedded inputs.

        Args:
          mask_BST: True where query position s may attend to key position t.
          cache: keys and values with room for T positions; this call writes its S positions at
            `write_at`. Without one, T = S.

        Returns:
          Hidden states after the final norm [B, S, D], and the keys and values [L, B, T, K, H].
        """

        def body(x: jax.Array, layer_and_past: tuple) -> tuple:
            layer, past = layer_and_past
            return layer(x, positions_BS, mask_BST, past, write_at)

        if self.config.remat:
            body = jax.checkpoint(body)
        past = None if cache is None else tuple(cache)
        x_BSD, kept = jax.lax.scan(body, x_BSD, (self.layers, past))
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
        return einsum(
            "BSD,DV->BSV",
            hidden_BSD,
            weight,
            out=("batch", None, "vocabulary"),
            preferred_element_type=jnp.float32,
        )


def causal_mask(segment_ids_BS: jax.Array) -> jax.Array:
    """Attention within each packed document, to itself and earlier positions: [B, S, S]."""
    length = segment_ids_BS.shape[1]
    causal = jnp.tril(jnp.ones((length, length), bool))
    return causal & (segment_ids_BS[:, :, None] == segment_ids_BS[:, None, :])
