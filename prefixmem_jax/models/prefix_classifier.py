"""Stage 1's model: the SID encoder alone, with a linear head that predicts the next code."""

from __future__ import annotations

import jax
from flax import nnx

from prefixmem_jax.data.batch import Batch
from prefixmem_jax.layers.softmax_head import SoftmaxHead
from prefixmem_jax.memory.table import Lookup
from prefixmem_jax.parallel.parameters import normal
from prefixmem_jax.parallel.sharding import constrain
from prefixmem_jax.semantic_ids.vocabulary import Vocabulary
from prefixmem_jax.sid_encoders.sid_encoder import SidEncoderConfig


class PrefixClassifier(nnx.Module):
    """Predicts c_{l+1} from m_l (the paper's first rung of pre-training): no transformer.

    Parts: `sid_encoder` (W_out) and `head`.
    """

    def __init__(
        self,
        sid_encoder: SidEncoderConfig,
        d_model: int,
        vocabulary: Vocabulary,
        *,
        sids_alone: bool = False,
        rngs: nnx.Rngs,
    ):
        """
        Args:
          sids_alone: the head has the tokens of SIDs, and no others.
        """
        self.vocabulary = vocabulary
        self.first, outputs = 0, vocabulary.size
        if sids_alone:
            self.first, outputs = vocabulary.sid_offset, sum(vocabulary.space.codebook_sizes)
        self.item_head = None
        self.row_dropout = sid_encoder.dropout
        # Nothing but the encoder feeds the head here, so W_out keeps the vector's scale.
        self.sid_encoder = sid_encoder.build(vocabulary, d_model, None, rngs)
        self.head = normal(rngs, 0.02, (d_model, "stored_model"), (outputs, "vocabulary"))

    def memory_addresses(self, batch: Batch, key: jax.Array | None = None) -> Lookup:
        """What a batch looks up."""
        del key
        return Lookup(self.sid_encoder.addresses(batch.tokens, batch.segment_ids))

    def __call__(
        self, batch: Batch, rows: jax.Array | None, key: jax.Array | None = None
    ) -> tuple[jax.Array, None]:
        """The encoder's vectors [B, S, D]; only active positions mean anything. Nothing is kept.

        Args:
          key: for dropout; None for none.
        """
        rows = self.sid_encoder.drop_rows(
            batch.tokens, batch.segment_ids, rows, self.row_dropout, key
        )
        with jax.named_scope("sid_encoder"):
            memory_BSD = self.sid_encoder(batch.tokens, batch.segment_ids, rows)
            return constrain(memory_BSD, "batch", None, None), None

    def predict(
        self, batch: Batch, rows: jax.Array | None, key: jax.Array | None = None
    ) -> tuple[jax.Array, SoftmaxHead]:
        """The vectors, and what scores the next token after them."""
        vectors_BSD, _ = self(batch, rows, key)
        return vectors_BSD, SoftmaxHead(
            constrain(self.head[...], None, "vocabulary"), first=self.first
        )
