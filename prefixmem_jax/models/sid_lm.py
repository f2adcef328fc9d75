"""An LLM that speaks SIDs: a SID encoder attached to its input embedding."""

from __future__ import annotations

import jax
from flax import nnx

from prefixmem_jax.config_groups import ItemHeadConfig
from prefixmem_jax.data.batch import Batch
from prefixmem_jax.layers.attention import KeyValues, Place
from prefixmem_jax.layers.softmax_head import SoftmaxHead
from prefixmem_jax.memory.table import Lookup
from prefixmem_jax.models.decoder import Decoder
from prefixmem_jax.models.encoder_decoder import Encoded, EncoderDecoder
from prefixmem_jax.models.item_head import build_item_head
from prefixmem_jax.parallel.sharding import constrain
from prefixmem_jax.semantic_ids.vocabulary import Vocabulary
from prefixmem_jax.sid_encoders.sid_encoder import SidEncoderConfig

# W_out of a fresh encoder near zero: attaching it hardly changes the model it is added to.
OUTPUT_STD = 0.01


class SidLM(nnx.Module):
    """Parts: `llm` (a decoder, or an encoder-decoder), if there is one `sid_encoder` (its dense
    parameters), and `item_head` if that has vectors of its own.
    """

    def __init__(
        self,
        llm: Decoder | EncoderDecoder,
        sid_encoder: SidEncoderConfig | None,
        vocabulary: Vocabulary,
        item_head: ItemHeadConfig | None = None,
        *,
        sids_alone: bool = False,
        rngs: nnx.Rngs,
    ):
        """Builds what is attached to an LLM.

        Args:
          sids_alone: it predicts nothing but the tokens of SIDs.
        """
        d_model = llm.config.d_model
        self.vocabulary = vocabulary
        self.sids_alone = sids_alone
        self.row_dropout = 0.0 if sid_encoder is None else sid_encoder.dropout
        self.llm = llm
        if sid_encoder is None:
            self.sid_encoder = None
        else:
            self.sid_encoder = sid_encoder.build(vocabulary, d_model, OUTPUT_STD, rngs)
        self.item_weight = 0.0 if item_head is None else item_head.weight
        if item_head is None:
            self.item_head = None
        else:
            self.item_head = build_item_head(item_head, vocabulary, d_model, rngs)

    @property
    def reach(self) -> int:
        """How many tokens before a position its input embedding depends on."""
        return 0 if self.sid_encoder is None else self.sid_encoder.reach

    def addresses(
        self, tokens_BS: jax.Array, segment_ids_BS: jax.Array, last: int | None = None
    ) -> jax.Array | None:
        """Memory rows to fetch, as `SidEncoder.addresses`; None without a table."""
        if self.sid_encoder is None:
            return None
        return self.sid_encoder.addresses(tokens_BS, segment_ids_BS, last)

    def memory_addresses(self, batch: Batch, key: jax.Array | None = None) -> Lookup:
        """What a batch looks up: `addresses`, and what the item head wants.

        Args:
          key: for what the item head draws; None gives the same items always.
        """
        items = Lookup()
        if self.item_head is not None:
            items = self.item_head.candidates(self.sid_encoder, key)
        return items._replace(by_position=self.addresses(batch.tokens, batch.segment_ids))

    def embed(
        self,
        tokens_BS: jax.Array,
        segment_ids_BS: jax.Array,
        rows: jax.Array | None,
        last: int | None = None,
        token_table: jax.Array | None = None,
    ) -> jax.Array:
        """The decoder's input [B, P, D]: token embeddings plus the SID encoder's vectors.

        Args:
          rows: memory rows at the `addresses`, None without a table.
          last: P, None for all positions.
          token_table: `Decoder.token_table`, where it is at hand.
        """
        newest = tokens_BS if last is None else tokens_BS[:, -last:]
        x_BPD = self.llm.embed(newest, token_table)
        if self.sid_encoder is not None:
            with jax.named_scope("sid_encoder"):
                memory_BPD = self.sid_encoder(tokens_BS, segment_ids_BS, rows, last)
                memory_BPD = self.sid_encoder.gate(memory_BPD, x_BPD)
                x_BPD = x_BPD + constrain(memory_BPD.astype(x_BPD.dtype), "batch", None, None)
        return x_BPD

    def __call__(
        self,
        batch: Batch,
        rows: jax.Array | None,
        key: jax.Array | None = None,
        token_table: jax.Array | None = None,
    ) -> tuple[jax.Array, KeyValues | Encoded]:
        """Hidden states [B, S, D] of whole sequences, and their keys and values.

        Args:
          rows: memory rows at `addresses`, None without a table.
          key: for dropout; None for none.
          token_table: `Decoder.token_table`, where it is at hand.
        """
        if key is not None:
            key, row_key = jax.random.split(key)
            if self.sid_encoder is not None:
                rows = self.sid_encoder.drop_rows(
                    batch.tokens, batch.segment_ids, rows, self.row_dropout, row_key
                )
        x_BSD = self.embed(batch.tokens, batch.segment_ids, rows, token_table=token_table)
        place = Place(batch.positions, batch.segment_ids)
        return self.llm(x_BSD, place, key, asked_BS=batch.loss_mask)

    def softmax_head(self, token_table: jax.Array | None = None) -> SoftmaxHead:
        """What scores the next token after hidden states.

        Args:
          token_table: as `embed`'s.
        """
        tokens = self.vocabulary
        first, stop = (tokens.sid_offset, tokens.used) if self.sids_alone else (0, None)
        return self.llm.softmax_head(first, stop, token_table=token_table)

    def predict(
        self, batch: Batch, rows: jax.Array | None, key: jax.Array | None = None
    ) -> tuple[jax.Array, SoftmaxHead]:
        """Hidden states as `__call__`, and what scores the next token after them."""
        token_table = self.llm.token_table()
        hidden_BSD, _ = self(batch, rows, key, token_table)
        return hidden_BSD, self.softmax_head(token_table)
