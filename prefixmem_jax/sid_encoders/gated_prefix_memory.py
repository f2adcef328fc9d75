"""PrefixMem whose vector the token's own embedding may hold back, in the manner of Engram."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx

from prefixmem_jax.config_groups import DecoderConfig
from prefixmem_jax.layers.transformer import RMSNorm
from prefixmem_jax.semantic_ids.vocabulary import Vocabulary
from prefixmem_jax.sid_encoders.prefix_memory import PrefixMemory, PrefixMemoryConfig


@dataclass(frozen=True)
class GatedPrefixMemoryConfig(PrefixMemoryConfig):
    """PrefixMem's sizes; the gate has none of its own. Beyond the paper."""

    def build(
        self, vocabulary: Vocabulary, d_model: int, output_std: float | None, rngs: nnx.Rngs
    ) -> GatedPrefixMemory:
        return GatedPrefixMemory(self, vocabulary, d_model, output_std, rngs=rngs)


class GatedPrefixMemory(PrefixMemory):
    """sigmoid(sum over d of w * x / rms(x) * m / rms(m) / sqrt(D)) * m, x the token's embedding.

    Engram's gate asks a hidden state, which knows the context; at the decoder's input there is
    the token alone. So the gate says how far to trust a code's memory, not when.
    """

    def __init__(
        self,
        config: GatedPrefixMemoryConfig,
        vocabulary: Vocabulary,
        d_model: int,
        output_std: float | None,
        *,
        rngs: nnx.Rngs,
    ):
        super().__init__(config, vocabulary, d_model, output_std, rngs=rngs)
        shape = DecoderConfig()
        self.embedding_norm = RMSNorm(d_model, shape)
        self.epsilon = shape.norm_epsilon

    def gate(self, vectors_BSD: jax.Array, embeddings_BSD: jax.Array) -> jax.Array:
        x_BSD, m_BSD = (x.astype(jnp.float32) for x in (embeddings_BSD, vectors_BSD))
        square_BS1 = jnp.mean(m_BSD**2, axis=-1, keepdims=True)
        product_BSD = self.embedding_norm(x_BSD) * m_BSD * jax.lax.rsqrt(square_BS1 + self.epsilon)
        gate_BS = jax.nn.sigmoid(product_BSD.sum(axis=-1) * product_BSD.shape[-1] ** -0.5)
        return vectors_BSD * gate_BS[..., None]
