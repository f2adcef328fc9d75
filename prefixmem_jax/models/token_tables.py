"""Tokens in and out: the embedding and the head of whatever stands between them."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from prefixmem_jax.config_groups import DecoderConfig
from prefixmem_jax.layers.softmax_head import SoftmaxHead
from prefixmem_jax.layers.transformer import WHOLE
from prefixmem_jax.parallel.parameters import normal
from prefixmem_jax.parallel.sharding import (
    constrain,
    constrain_gathered,
    gather_over_fsdp,
    take,
)

# The axis of tokens in each table of them.
TOKEN_AXIS = {"embedding": 0, "head": 1}


class TokenTables(nnx.Module):
    """Base of models of embedded tokens: `embedding`, and `head` where it is not tied."""

    config: DecoderConfig

    def make_embedding(self, vocabulary_size: int, rngs: nnx.Rngs) -> None:
        """Draws the embedding."""
        size = (self.config.d_model, "stored_embedded")
        self.embedding = normal(rngs, self.config.init_std, (vocabulary_size, None), size)

    def make_head(self, vocabulary_size: int, rngs: nnx.Rngs) -> None:
        """Draws the head, where there is one."""
        if not self.config.tied_embeddings:
            outputs = (vocabulary_size, "vocabulary")
            model = (self.config.d_model, "stored_model")
            self.head = normal(rngs, self.config.init_std, model, outputs)

    @jax.named_scope("embedding")
    def token_table(self) -> jax.Array:
        """The embedding [V, D] in the compute dtype, gathered over fsdp.

        Where input and output share it, one gather for both sends its gradient once.
        """
        return gather_over_fsdp(self.embedding[...], self.config.compute_dtype, None, "embedded")

    @jax.named_scope("embedding")
    def embed(self, tokens_BS: jax.Array, token_table: jax.Array | None = None) -> jax.Array:
        """Token embeddings [B, S, D] in the compute dtype.

        Args:
          token_table: as `token_table` gives it, where it is at hand.
        """
        if token_table is None:
            token_table = self.token_table()
        x_BSD = constrain(take(token_table, tokens_BS, "batch", None, "embedded"), *WHOLE)
        if self.config.scale_embedding:
            x_BSD *= jnp.asarray(self.config.d_model**0.5, x_BSD.dtype)
        return x_BSD

    @jax.named_scope("head")
    def softmax_head(
        self, first: int = 0, stop: int | None = None, token_table: jax.Array | None = None
    ) -> SoftmaxHead:
        """What scores tokens first..stop-1 (default: the whole vocabulary).

        Args:
          token_table: as `token_table` gives it, where it is at hand.
        """
        if self.config.tied_embeddings:
            if token_table is None:
                token_table = self.token_table()
            weight = constrain_gathered(token_table[first:stop], "vocabulary", None).T
        else:
            head, dtype = self.head[:, first:stop], self.config.compute_dtype
            weight = gather_over_fsdp(head, dtype, None, "vocabulary")
        return SoftmaxHead(weight, self.config.logit_softcap, first=first)
