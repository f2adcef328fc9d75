"""SIDs only: `BOS, SID of item 1, SID of item 2, ...`, as recommending asks for them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from prefixmem_jax.config_groups import DataConfig
from prefixmem_jax.data.documents.document import (
    Corpus,
    Documents,
    offsets_of,
)
from prefixmem_jax.data.documents.sequences import Sequences
from prefixmem_jax.data.splits import Examples, Ranges
from prefixmem_jax.semantic_ids.vocabulary import Vocabulary


@dataclass(frozen=True)
class Items(Sequences):
    """Training sequences; each token after BOS is to be predicted."""

    sids_alone: ClassVar[bool] = True

    def documents(self, corpus: Corpus, rng: np.random.Generator) -> Documents:
        data = corpus.data
        ranges = self.ranges(corpus, data.vocabulary.levels, rng)
        documents = documents_of(data.split.items, ranges, data.item_tokens, data.vocabulary)
        documents.loss_mask[:] = 1
        documents.loss_mask[documents.offsets[1:] - 1] = 0
        return documents

    def longest(self, config: DataConfig, levels: int) -> int:
        return min(config.sequence_length, document_length(levels, config.max_items))


def document_length(levels: int, items: int) -> int:
    """Tokens of a document of items."""
    return 1 + levels * items


def example_documents(
    examples: Examples, item_tokens: np.ndarray, vocabulary: Vocabulary, max_items: int
) -> Documents:
    """The last `max_items` items of each history, then the target; only the target is predicted."""
    starts = np.maximum(examples.starts, examples.targets_at - max_items)
    ranges = Ranges(starts, examples.targets_at + 1)
    documents = documents_of(examples.items, ranges, item_tokens, vocabulary)
    ask_for_last_item(documents, vocabulary.levels)
    return documents


def ask_for_last_item(documents: Documents, levels: int) -> None:
    """Makes each document's last item what is to be predicted, and nothing else."""
    documents.loss_mask[:] = 0
    for back in range(levels):
        documents.loss_mask[documents.offsets[1:] - 2 - back] = 1


def prompt_documents(
    histories: Sequence[np.ndarray],
    item_tokens: np.ndarray,
    vocabulary: Vocabulary,
    max_items: int,
) -> Documents:
    """The last `max_items` items of each history, to go on from; BOS alone where it is empty.

    What comes after the last token is to be predicted.
    """
    kept = [np.asarray(history, np.int64)[-max_items:] for history in histories]
    stops = np.cumsum([len(history) for history in kept], dtype=np.int64)
    starts = np.concatenate([np.zeros(1, np.int64), stops])[: len(kept)]
    items = np.concatenate([np.zeros(0, np.int64), *kept])
    documents = documents_of(items, Ranges(starts, stops), item_tokens, vocabulary)
    documents.loss_mask[documents.offsets[1:] - 1] = 1
    return documents


def documents_of(
    items: np.ndarray, ranges: Ranges, item_tokens: np.ndarray, vocabulary: Vocabulary
) -> Documents:
    """A document for each range of items; nothing to be predicted."""
    lengths = 1 + vocabulary.levels * ranges.lengths
    offsets = offsets_of(lengths)
    tokens = np.empty(offsets[-1], np.int32)
    is_sid = np.ones(len(tokens), bool)
    is_sid[offsets[:-1]] = False
    tokens[~is_sid] = vocabulary.bos_token
    named = items[ranges.indices()]
    tokens[is_sid] = item_tokens[named].reshape(-1)
    next_item = np.zeros(len(tokens), np.int32)
    next_item[np.flatnonzero(is_sid)[:: vocabulary.levels] - 1] = named + 1
    return Documents(tokens, np.zeros(len(tokens), np.float32), next_item, offsets)
