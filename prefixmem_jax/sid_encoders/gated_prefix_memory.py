"""PrefixMem whose vector the token's own embedding may hold back, in the manner of Engram."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx

from prefixmem_jax.parallel.parameters import parameter
from prefixmem_jax.semantic_ids.vocabulary import Vocabulary
from prefixmem_jax.sid_encoders.prefix_memory import PrefixMemory, PrefixMemoryConfig

EPSILON = 1e-6


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
        self.agreement = parameter(jnp.ones(d_model, jnp.float32), None)

    def gate(self, vectors_BPD: jax.Array, embeddings_BPD: jax.Array) -> jax.Array:
        product_BPD = _normalised(vectors_BPD) * _normalised(embeddings_BPD) * self.agreement[...]
        gate_BP = jax.nn.sigmoid(product_BPD.sum(axis=-1) * product_BPD.shape[-1] ** -0.5)
        return vectors_BPD * gate_BP[..., None]


def _normalised(x_BPD: jax.Array) -> jax.Array:
    x_BPD = x_BPD.astype(jnp.float32)
    return x_BPD * jax.lax.rsqrt(jnp.mean(x_BPD**2, axis=-1, keepdims=True) + EPSILON)
