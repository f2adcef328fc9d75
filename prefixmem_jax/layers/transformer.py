"""One transformer layer: pre-norm attention with rotary embeddings, gated feed-forward."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from prefixmem_jax.config_groups import DecoderConfig, RopeScalingConfig
from prefixmem_jax.layers.attention import KeyValues
from prefixmem_jax.layers.dropout import dropout
from prefixmem_jax.layers.fixed_products import halves_swapped, mean_by_product
from prefixmem_jax.parallel.parameters import normal, parameter
from prefixmem_jax.parallel.sharding import einsum, gather_over_fsdp, on_tpus

# Of axes that are no longer a TPU takes the mean as a product: heads, not models.
LONGEST_PRODUCT = 256
# What remat policies call feed-forward's first products, and what attention is given.
WIDENED, ROTATED = "widened", "rotated"
WHOLE = ("batch", None, None)  # activations [B, S, D]: on every tensor-parallel device alike

# Attends with a layer's queries, keys and values of the same tokens; returns [B, S, N, H] and what
# of the keys and values to keep.
Attend = Callable[[jax.Array, KeyValues], tuple[jax.Array, KeyValues]]


class RMSNorm(nnx.Module):
    def __init__(self, size: int, config: DecoderConfig):
        self.offset = 1.0 if config.norm_plus_one else 0.0
        self.scale = parameter(jnp.full(size, 1.0 - self.offset, jnp.float32), None)
        self.epsilon = config.norm_epsilon

    def __call__(self, x: jax.Array) -> jax.Array:
        x32 = x.astype(jnp.float32)
        normed = x32 * jax.lax.rsqrt(_mean(x32**2) + self.epsilon)
        return (normed * (self.offset + self.scale[...])).astype(x.dtype)


def _mean(x: jax.Array) -> jax.Array:
    """The last axis' mean, float32, which broadcasts against x."""
    short = on_tpus() and x.shape[-1] <= LONGEST_PRODUCT
    return mean_by_product(x) if short else jnp.mean(x, axis=-1, keepdims=True)


class Rotation(NamedTuple):
    """Of rotary position embeddings, float32 [..., B, S, H / 2] each, or [..., B, S, H] on TPUs."""

    cos: jax.Array
    sin: jax.Array


def rotation(positions_BS: jax.Array, frequency_H: jax.Array) -> Rotation:
    """For all layers with these frequencies, float32 [H / 2], or [K, 1, 1, H / 2] of some kinds."""
    angle_BSH = positions_BS[..., None].astype(jnp.float32) * frequency_H
    cos, sin = jnp.cos(angle_BSH), jnp.sin(angle_BSH)
    if on_tpus():
        cos, sin = (jnp.concatenate(pair, axis=-1) for pair in ((cos, cos), (-sin, sin)))
    return Rotation(cos, sin)


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


def rotate(x_BSNH: jax.Array, by_BSH: Rotation) -> jax.Array:
    """Rotary position embedding, rotate-half form, computed in float32."""
    cos, sin = by_BSH.cos[:, :, None], by_BSH.sin[:, :, None]
    x32_BSNH = x_BSNH.astype(jnp.float32)
    if on_tpus():
        turned = x32_BSNH * cos + halves_swapped(x_BSNH) * sin
    else:
        first, second = jnp.split(x32_BSNH, 2, axis=-1)
        turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return checkpoint_name(turned.astype(x_BSNH.dtype), ROTATED)


def to_heads(x_BSD: jax.Array, weight: nnx.Param) -> jax.Array:
    """Projected by a weight [D, N, H]: [B, S, N, H]."""
    weight_DNH = gather_over_fsdp(weight[...], x_BSD.dtype, None, "heads", None)
    return einsum("BSD,DNH->BSNH", x_BSD, weight_DNH, out=("batch", None, "heads", None))


def from_heads(x_BSNH: jax.Array, weight: nnx.Param) -> jax.Array:
    """Projected back by a weight [N, H, D]: [B, S, D]."""
    weight_NHD = gather_over_fsdp(weight[...], x_BSNH.dtype, "heads", None, None)
    return einsum("BSNH,NHD->BSD", x_BSNH, weight_NHD, out=WHOLE)


_ACTIVATIONS = {"silu": jax.nn.silu, "gelu_tanh": partial(jax.nn.gelu, approximate=True)}


class Layer(nnx.Module):
    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs):
        model, feed_forward = (config.d_model, "stored_model"), (config.d_ff, "feed_forward")
        heads, kv_heads = (config.query_heads, "heads"), (config.kv_heads, "heads")
        size, std = (config.head_dim, None), config.init_std
        self.attention_norm = RMSNorm(config.d_model, config)
        self.query = normal(rngs, std, model, heads, size)
        self.key = normal(rngs, std, model, kv_heads, size)
        self.value = normal(rngs, std, model, kv_heads, size)
        self.output = normal(rngs, std, heads, size, model)
        if config.qk_norm:
            self.query_norm = RMSNorm(config.head_dim, config)
            self.key_norm = RMSNorm(config.head_dim, config)
        self.mlp_norm = RMSNorm(config.d_model, config)
        if config.post_norms:
            self.attention_post_norm = RMSNorm(config.d_model, config)
            self.mlp_post_norm = RMSNorm(config.d_model, config)
        self.gate = normal(rngs, std, model, feed_forward)
        self.up = normal(rngs, std, model, feed_forward)
        self.down = normal(rngs, std, feed_forward, model)
        self.config = config

    def __call__(
        self,
        x_BSD: jax.Array,
        rotation_BSH: Rotation | None,
        attend: Attend,
        key: jax.Array | None = None,
    ) -> tuple[jax.Array, KeyValues]:
        """The layer's output, and what `attend` keeps.

        Args:
          rotation_BSH: of queries and keys; None for none.
          key: for dropout; None for none.
        """
        keys = (None, None) if key is None else jax.random.split(key)
        x_BSD, kept = self.attended(x_BSD, rotation_BSH, attend, keys[0])
        return self.fed_forward(x_BSD, keys[1]), kept

    def attended(
        self,
        x_BSD: jax.Array,
        rotation_BSH: Rotation | None,
        attend: Attend,
        key: jax.Array | None,
    ) -> tuple[jax.Array, KeyValues]:
        """Its first half."""
        y, kept = self._attention(self.attention_norm(x_BSD), rotation_BSH, attend)
        if self.config.post_norms:
            y = self.attention_post_norm(y)
        return x_BSD + dropout(y, self.config.dropout, key, *WHOLE), kept

    def fed_forward(self, x_BSD: jax.Array, key: jax.Array | None) -> jax.Array:
        """Its second half."""
        y = self._feed_forward(self.mlp_norm(x_BSD))
        if self.config.post_norms:
            y = self.mlp_post_norm(y)
        return x_BSD + dropout(y, self.config.dropout, key, *WHOLE)

    @jax.named_scope("attention")
    def _attention(
        self,
        x_BSD: jax.Array,
        rotation_BSH: Rotation | None,
        attend: Attend,
    ) -> tuple[jax.Array, KeyValues]:
        query, key, value = (to_heads(x_BSD, w) for w in (self.query, self.key, self.value))
        if self.config.qk_norm:
            query, key = self.query_norm(query), self.key_norm(key)
        if rotation_BSH is not None:
            query, key = rotate(query, rotation_BSH), rotate(key, rotation_BSH)
        attended, kept = attend(query, KeyValues(key, value))
        return from_heads(attended, self.output), kept

    @jax.named_scope("mlp")
    def _feed_forward(self, x_BSD: jax.Array) -> jax.Array:
        dtype = x_BSD.dtype
        gate, up = (
            einsum(
                "BSD,DF->BSF",
                x_BSD,
                gather_over_fsdp(w[...], dtype, None, "feed_forward"),
                out=("batch", None, "feed_forward"),
                name=WIDENED,
            )
            for w in (self.gate, self.up)
        )
        down = gather_over_fsdp(self.down[...], dtype, "feed_forward", None)
        activated = _ACTIVATIONS[self.config.activation](gate)
        return einsum("BSF,FD->BSD", activated * up, down, out=WHOLE)
