"""A transformer layer that also attends to an encoder's output: the decoder half of T5's shape."""

from __future__ import annotations

import jax
from flax import nnx

from prefixmem_jax.config_groups import DecoderConfig
from prefixmem_jax.layers.attention import NO_WINDOW, KeyValues, Place, attention
from prefixmem_jax.layers.dropout import dropout
from prefixmem_jax.layers.transformer import (
    WHOLE,
    Attend,
    Layer,
    RMSNorm,
    from_heads,
    to_heads,
)
from prefixmem_jax.parallel.parameters import normal


class CrossLayer(Layer):
    """Attention to its own tokens, to the encoder's, and feed-forward; no rotation.

    Queries and keys between the two are not normalised, `DecoderConfig.qk_norm` or not.
    """

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs):
        super().__init__(config, rngs=rngs)
        model, size = (config.d_model, "stored_model"), (config.head_dim, None)
        std = config.init_std
        heads, kv_heads = (config.query_heads, "heads"), (config.kv_heads, "heads")
        self.cross_norm = RMSNorm(config.d_model, config)
        self.cross_query = normal(rngs, std, model, heads, size)
        self.cross_key = normal(rngs, std, model, kv_heads, size)
        self.cross_value = normal(rngs, std, model, kv_heads, size)
        self.cross_output = normal(rngs, std, heads, size, model)

    @jax.named_scope("attention")
    def encoded(self, encoded_BSD: jax.Array) -> KeyValues:
        """Keys and values [B, S, K, H] of an encoder's output."""
        return KeyValues(
            to_heads(encoded_BSD, self.cross_key), to_heads(encoded_BSD, self.cross_value)
        )

    def __call__(
        self,
        x_BTD: jax.Array,
        queries: Place,
        attend: Attend,
        encoded: KeyValues,
        keys: Place,
        key: jax.Array | None = None,
    ) -> tuple[jax.Array, KeyValues]:
        """The layer's output, and what `attend` keeps.

        Args:
          queries, keys: where the T tokens and the encoder's stand. A token attends to the
            encoder's that stand no later in the same segment.
          attend: with the tokens' own queries, keys and values.
          encoded: as `encoded` gives it.
          key: for dropout; None for none.
        """
        dropping = (None,) * 3 if key is None else jax.random.split(key, 3)
        x_BTD, kept = self.attended(x_BTD, None, attend, dropping[0])
        with jax.named_scope("attention"):
            query = to_heads(self.cross_norm(x_BTD), self.cross_query)
            scale = self.config.query_scale
            y = attention(query, queries, encoded, keys, NO_WINDOW, scale)
            y = from_heads(y, self.cross_output)
        x_BTD = x_BTD + dropout(y, self.config.dropout, dropping[1], *WHOLE)
        return self.fed_forward(x_BTD, dropping[2]), kept
