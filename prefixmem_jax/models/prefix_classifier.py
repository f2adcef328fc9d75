"""Stage 1's model: the SID encoder alone, with a linear head that predicts the next code."""

from __future__ import annotations

import jax
from flax import nnx

from prefixmem_jax.config import PrefixMemoryConfig
from prefixmem_jax.sid_encoders.prefix_memory import PrefixMemory
from prefixmem_jax.parallel.sharding import constrain, einsum
from prefixmem_jax.semantic_ids.space import SidSpace


class PrefixClassifier(nnx.Module):
    """Predicts c_{l+1} from m_l (the paper's first rung of pre-training): no transformer.

    Parts: `encoder` (W_out) and `head`.
    """

    def __init__(
        self, encoder: PrefixMemoryConfig, d_model: int, space: SidSpace, *, rngs: nnx.Rngs
    ):
        self.space = space
        # Nothing but the memory feeds the head here, so W_out keeps the vector's scale.
        self.encoder = PrefixMemory(encoder, space, d_model, encoder.d_mem**-0.5, rngs=rngs)
        self.head = nnx.Param(
            0.02 * jax.random.normal(rngs.params(), (d_model, space.vocabulary_size))
        )

    def next_token_logits(
        self,
        tokens_BS: jax.Array,
        segment_ids_BS: jax.Array,
        positions_BS: jax.Array,
        memory_rows: jax.Array | None,
    ) -> jax.Array:
        """Float32 logits [B, S, V] of the next token; only active positions mean anything."""
        del tokens_BS, segment_ids_BS, positions_BS
        with jax.named_scope("encoder"):
            memory_BSD = constrain(self.encoder(memory_rows), "batch", None, None)
        head = constrain(self.head[...], None, "vocabulary")
        return einsum("BSD,DV->BSV", memory_BSD, head, out=("batch", None, "vocabulary"))
