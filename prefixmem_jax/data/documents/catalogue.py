"""Every item's SID, whether anybody has touched it or not: `BOS, SID`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

import numpy as np
from pydantic import Field

from prefixmem_jax.config_groups import DataConfig
from prefixmem_jax.data.documents.document import Corpus, Documents, DocumentsConfig
from prefixmem_jax.data.documents.items import document_length, documents_of
from prefixmem_jax.data.documents.sequences import most_items
from prefixmem_jax.data.splits import Ranges


@dataclass(frozen=True)
class Catalogue(DocumentsConfig):
    """All items alike, their first code unasked for: which are popular it does not tell.

    Beside the histories it makes prefixes known that nobody's history has. There each item is once
    if its `weight` is as many times theirs as there are items to a document of theirs.

    Attributes:
      loss_weight: of a prediction here, where one in the other documents has 1.
    """

    loss_weight: Annotated[float, Field(gt=0, le=1)] = 0.1
    sids_alone: ClassVar[bool] = True

    def documents(self, corpus: Corpus, rng: np.random.Generator) -> Documents:
        del rng
        data, levels = corpus.data, corpus.data.vocabulary.levels
        most_items(corpus.config, 1, levels)
        items = corpus.share(len(data.item_tokens))
        ranges = Ranges(np.arange(len(items)), np.arange(len(items)) + 1)
        documents = documents_of(items, ranges, data.item_tokens, data.vocabulary)
        documents.loss_mask[:] = self.loss_weight
        documents.loss_mask[documents.offsets[:-1]] = 0
        documents.loss_mask[documents.offsets[1:] - 1] = 0
        documents.next_item[:] = 0
        return documents

    def longest(self, config: DataConfig, levels: int) -> int:
        del config
        return document_length(levels, 1)
