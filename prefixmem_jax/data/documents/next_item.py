"""A history and the item that came next, which alone is predicted: `BOS, SIDs, SID`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
from pydantic import PositiveInt

from prefixmem_jax.config_groups import DataConfig
from prefixmem_jax.data.documents.document import Corpus, Documents, DocumentsConfig
from prefixmem_jax.data.documents.items import (
    ask_for_last_item,
    document_length,
    documents_of,
)
from prefixmem_jax.data.documents.sequences import most_items, subsequences
from prefixmem_jax.errors import UserError


@dataclass(frozen=True)
class NextItem(DocumentsConfig):
    """Random items of the training sequences, each behind as much of its history as validation has.

    Attributes:
      draws: how many of each sequence, any item but the first, drawn once and for all; sequences of
        one item have none.
    """

    draws: PositiveInt = field(default=4, kw_only=True)
    sids_alone: ClassVar[bool] = True

    def documents(self, corpus: Corpus, rng: np.random.Generator) -> Documents:
        data, levels = corpus.data, corpus.data.vocabulary.levels
        most = most_items(corpus.config, corpus.config.max_items + 1, levels)
        if most < 2:
            raise UserError(
                f"data.sequence_length={corpus.config.sequence_length} is too short: an item and "
                f"the next one need {document_length(levels, 2)} tokens"
            )
        train = corpus.train.take(np.flatnonzero(corpus.train.lengths > 1))
        ranges = subsequences(train, most, self.draws, rng)
        documents = documents_of(data.split.items, ranges, data.item_tokens, data.vocabulary)
        ask_for_last_item(documents, levels)
        return documents

    def longest(self, config: DataConfig, levels: int) -> int:
        return min(config.sequence_length, document_length(levels, config.max_items + 1))
