"""A decoder that speaks SIDs: an LLM with a SID encoder attached to its input embedding."""

from __future__ import annotations

import jax
from flax import nnx

from prefixmem_jax.config import DecoderConfig, PrefixMemoryConfig
from prefixmem_jax.sid_encoders.prefix_memory import PrefixMemory
from prefixmem_jax.models.decoder import Cache, Decoder, causal_mask
from prefixmem_jax.parallel.sharding import constrain
from prefixmem_jax.semantic_ids.space import SidSpace


class SidLM(nnx.Module):
    """Parts: `llm` (the decoder) and `encoder` (dense parameters of the SID encoder, if any)."""

    def __init__(
        self,
        model: DecoderConfig,
        encoder: PrefixMemoryConfig | None,
        space: SidSpace,
        *,
        rngs: nnx.Rngs,
    ):
        self.space = space
        self.llm = Decoder(model, space.vocabulary_size, rngs=rngs)
        if encoder is None:
            self.encoder = None
        else:
            # W_out near zero: attaching the encoder hardly changes the model it is added to.
            self.encoder = PrefixMemory(encoder, space, model.d_model, 0.01, rngs=rngs)

    def read_memory(
        self, memory: jax.Array | None, tokens_BS: jax.Array, segment_ids_BS: jax.Array
    ) -> jax.Array | None:
        """The memory's rows at every position, without gradients; None without encoder."""
        if self.encoder is None:
            return None
        return self.encoder.table.read(memory, self.encoder.addresses(tokens_BS, segment_ids_BS))

    def embed(self, tokens_BS: jax.Array, memory_rows: jax.Array | None) -> jax.Array:
        """The decoder's input: token embeddings, plus the memory at SID positions."""
        x_BSD = self.llm.embed(tokens_BS)
        if memory_rows is not None:
            with jax.named_scope("encoder"):
                memory_BSD = self.encoder(memory_rows).astype(x_BSD.dtype)
                x_BSD = x_BSD + constrain(memory_BSD, "batch", None, None)
        return x_BSD

    def __call__(
        self,
        tokens_BS: jax.Array,
        segment_ids_BS: jax.Array,
        positions_BS: jax.Array,
        memory_rows: jax.Array | None,
    ) -> tuple[jax.Array, Cache]:
        """Hidden states [B, S, D] of whole sequences, and their keys and values.

        Args:
          memory_rows: rows at `encoder.addresses(tokens, segment_ids)`, None without encoder.
        """
        x_BSD = self.embed(tokens_BS, memory_rows)
        return self.llm(x_BSD, positions_BS, causal_mask(segment_ids_BS))

    def next_token_logits(
        self,
        tokens_BS: jax.Array,
        segment_ids_BS: jax.Array,
        positions_BS: jax.Array,
        memory_rows: jax.Array | None,
    ) -> jax.Array:
        """Float32 logits [B, S, V] of the next token at every position."""
        hidden, _ = self(tokens_BS, segment_ids_BS, positions_BS, memory_rows)
        return self.llm.logits(hidden)
