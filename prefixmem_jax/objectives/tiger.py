"""Generative retrieval by an encoder-decoder (TIGER, Rajput et al. 2023), alone or with a memory.

In the paper it is both a system of its own and the second rung of the memory's pre-training ladder.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar

from flax import nnx
from pydantic import Field, PositiveInt

from prefixmem_jax.data.documents.document import DocumentsConfig
from prefixmem_jax.data.documents.next_item import NextItem
from prefixmem_jax.errors import UserError
from prefixmem_jax.models.encoder_decoder import EncoderDecoder
from prefixmem_jax.models.sid_lm import SidLM
from prefixmem_jax.objectives.next_token import NextToken
from prefixmem_jax.semantic_ids.vocabulary import Vocabulary


@dataclass(frozen=True)
class Tiger(NextToken):
    """Cross-entropy of the codes of the item that follows a history.

    The shape is `model`'s, of which rotary positions are not used: the decoder has `model.layers`.
    The memory is added to the codes that the encoder reads, and to those of the item being written.

    Attributes:
      documents: `next_item` alone.
      encoder_layers: of the encoder.
      answers: documents that a packed row has at most. The decoder runs for so many in every row.
    """

    documents: Annotated[tuple[DocumentsConfig, ...], Field(min_length=1)] = field(
        default=(NextItem(),), kw_only=True
    )
    encoder_layers: PositiveInt = field(default=2, kw_only=True)
    answers: PositiveInt = field(default=4, kw_only=True)
    exports: ClassVar[bool] = False

    def check(self, config: Any) -> None:
        super().check(config)
        if not all(isinstance(one, NextItem) for one in self.documents):
            raise UserError("objective.documents: tiger learns from next_item alone")
        if config.data.tokenizer is not None or config.init.from_huggingface is not None:
            raise UserError(
                "objective=tiger speaks SIDs alone, and starts from no LLM; expected "
                "data.tokenizer=none and init.from_huggingface=none"
            )
        shape = config.model
        if shape.sliding_layers or shape.rope_scaling or shape.post_norms or shape.scale_embedding:
            raise UserError(
                "objective=tiger has relative positions and T5's layers; expected "
                "model.sliding_layers=(), model.rope_scaling=none, model.post_norms=false and "
                "model.scale_embedding=false"
            )

    def build_model(self, config: Any, vocabulary: Vocabulary, rngs: nnx.Rngs) -> SidLM:
        llm = EncoderDecoder(
            config.model,
            self.encoder_layers,
            vocabulary.size,
            vocabulary.levels,
            self.answers,
            rngs=rngs,
        )
        attached = config.sid_encoder, vocabulary, config.item_head
        return SidLM(llm, *attached, sids_alone=self.sids_alone, rngs=rngs)

    @property
    def documents_per_row(self) -> int:
        return self.answers

    @property
    def rows_depend_on(self) -> Any:
        return [super().rows_depend_on, self.answers]
