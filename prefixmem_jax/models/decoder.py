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


class Cache(NamedTuple):
    """Keys and values of earlier positions, [L, B, T, K, H] each."""

    keys: jax.Array
    values: jax.Array


def _normal(rngs: nnx.Rngs, shape: tuple[int, ...], std: float) -> nnx.Param:
    return nnx.Param(std * jax.random.normal(rngs.params(), shape, jnp.float32))


def _matmul(equation: str, x: jax.Array, weight: nnx.Param) -> jax.Array:
    return jnp.einsum(equation, x, weight[...].astype(x.dtype))


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
        y = self.attention_norm(x_BSD)
        query = _matmul("BSD,DNH->BSNH", y, self.query)
        key = _matmul("BSD,DKH->BSKH", y, self.key)
        value = _matmul("BSD,DKH->BSKH", y, self.value)
        if self.config.qk_norm:
            query, key = self.query_norm(query), self.key_norm(key)
        query = rotate(query, positions_BS, self.config.rope_base)
        key = rotate(key, positions_BS, self.config.rope_base)
        if past is not None:
            key = jax.lax.dynamic_update_slice_in_dim(past[0], key, write_at, axis=1)
            value = jax.lax.dynamic_update_slice_in_dim(past[1], value, write_at, axis=1)
        attended = jax.nn.dot_product_attention(query, key, value, mask=mask_BST[:, None])
        x_BSD = x_BSD + _matmul("BSNH,NHD->BSD", attended, self.output)
        y = self.mlp_norm(x_BSD)
        y = jax.nn.silu(_matmul("BSD,DF->BSF", y, self.gate)) * _matmul("BSD,DF->BSF", y, self.up)
        return x_BSD + _matmul("BSF,FD->BSD", y, self.down), (key, value)


class Decoder(nnx.Module):
    """Token embeddings, the stacked layers, the final norm and the head."""

    def __init__(self, config: DecoderConfig, vocabulary_size: int, *, rngs: nnx.Rngs):
        self.config = config
        self.embedding = _normal(rngs, (vocabulary_size, config.d_model), config.init_std)
        self.layers = nnx.vmap(lambda r: Layer(config, rngs=r))(rngs.fork(split=config.layers))
        self.final_norm = RMSNorm(config.d_model, config.norm_epsilon)
        if not config.tied_embeddings:
            self.head = _normal(rngs, (config.d_model, vocabulary_size), config.init_std)

    def embed(self, tokens_BS: jax.Array) -> jax.Array:
        """Token embeddings [B, S, D] in the compute dtype."""
        table = self.embedding[...].astype(self.config.compute_dtype)
        return table.at[tokens_BS].get(out_sharding=jax.typeof(tokens_BS).sharding)

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

    def logits(self, hidden: jax.Array, first: int = 0, stop: int | None = None) -> jax.Array:
        """Float32 logits of tokens first..stop-1 (default: the whole vocabulary)."""
        if self.config.tied_embeddings:
            weight = self.embedding[...][first:stop].T
        else:
            weight = self.head[...][:, first:stop]
        return jnp.einsum(
            "...D,DV->...V",
            hidden,
            weight.astype(hidden.dtype),
            preferred_element_type=jnp.float32,
        )


def causal_mask(segment_ids_BS: jax.Array) -> jax.Array:
    """Attention within each packed document, to itself and earlier positions: [B, S, S]."""
    length = segment_ids_BS.shape[1]
    causal = jnp.tril(jnp.ones((length, length), bool))
    return causal & (segment_ids_BS[:, :, None] == segment_ids_BS[:, None, :])
