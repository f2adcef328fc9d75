"""What one training example says, before packing.

A document of items is `BOS, SID of item 1, SID of item 2, ...`. Another kind of document is
another function that makes `Documents`; packing asks no more of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from prefixmem_jax.data.splits import Examples, Ranges
from prefixmem_jax.errors import UserError
from prefixmem_jax.semantic_ids.vocabulary import Vocabulary


@dataclass(frozen=True)
class Documents:
    """Token sequences of any lengths, in flat arrays.

    Attributes:
      tokens: int32 [tokens].
      loss_mask: float32 [tokens], 1 where the *next* token is to be predicted.
      next_item: int32 [tokens], 1 + the item that starts with the next token; 0 where none does.
      offsets: int64 [documents + 1]; document i is tokens[offsets[i]:offsets[i + 1]].
    """

    tokens: np.ndarray
    loss_mask: np.ndarray
    next_item: np.ndarray
    offsets: np.ndarray

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of every document, int64 [documents]."""
        return np.diff(self.offsets)


def document_length(levels: int, items: int) -> int:
    """Tokens of a document of items."""
    return 1 + levels * items


def training_documents(
    items: np.ndarray,
    ranges: Ranges,
    item_tokens: np.ndarray,
    vocabulary: Vocabulary,
    max_items: int,
    length: int,
) -> Documents:
    """Every token after BOS of every sequence, to be predicted.

    Sequences of more items than a document holds are cut into windows, the newest window full.

    Args:
      items: what `ranges` are over.
      item_tokens: int32 [catalogue, levels].
      max_items: that a document holds; fewer where `length` has no room for them.
      length: of the packed rows, in tokens.
    """
    levels = vocabulary.levels
    max_items = min(max_items, (length - 1) // levels)
    if max_items < 1:
        raise UserError(
            f"data.sequence_length={length} is too short: one item needs "
            f"{document_length(levels, 1)} tokens"
        )
    windows = -(-ranges.lengths // max_items)
    sequence = np.repeat(np.arange(len(ranges)), windows)
    newer = np.arange(len(sequence)) - np.repeat(np.cumsum(windows) - windows, windows)
    stops = ranges.stops[sequence] - newer * max_items
    starts = np.maximum(ranges.starts[sequence], stops - max_items)
    documents = _of_items(items, Ranges(starts, stops), item_tokens, vocabulary)
    documents.loss_mask[:] = 1
    documents.loss_mask[documents.offsets[1:] - 1] = 0
    return documents


def example_documents(
    examples: Examples, item_tokens: np.ndarray, vocabulary: Vocabulary, max_items: int
) -> Documents:
    """The last `max_items` items of each history, then the target; only the target is predicted."""
    starts = np.maximum(examples.starts, examples.targets_at - max_items)
    ranges = Ranges(starts, examples.targets_at + 1)
    documents = _of_items(examples.items, ranges, item_tokens, vocabulary)
    for back in range(vocabulary.levels):
        documents.loss_mask[documents.offsets[1:] - 2 - back] = 1
    return documents


def prompt_documents(
    histories: Sequence[np.ndarray],
    item_tokens: np.ndarray,
    vocabulary: Vocabulary,
    max_items: int,
) -> Documents:
    """The last `max_items` items of each history, to go on from; BOS alone where it is empty."""
    kept = [np.asarray(history, np.int64)[-max_items:] for history in histories]
    stops = np.cumsum([len(history) for history in kept], dtype=np.int64)
    starts = np.concatenate([np.zeros(1, np.int64), stops])[: len(kept)]
    items = np.concatenate([np.zeros(0, np.int64), *kept])
    return _of_items(items, Ranges(starts, stops), item_tokens, vocabulary)


def _of_items(
    items: np.ndarray, ranges: Ranges, item_tokens: np.ndarray, vocabulary: Vocabulary
) -> Documents:
    """A document for each range of items; nothing to be predicted."""
    lengths = 1 + vocabulary.levels * ranges.lengths
    offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)])
    tokens = np.empty(offsets[-1], np.int32)
    is_sid = np.ones(len(tokens), bool)
    is_sid[offsets[:-1]] = False
    tokens[~is_sid] = vocabulary.bos_token
    named = items[ranges.indices()]
    tokens[is_sid] = item_tokens[named].reshape(-1)
    next_item = np.zeros(len(tokens), np.int32)
    next_item[np.flatnonzero(is_sid)[:: vocabulary.levels] - 1] = named + 1
    return Documents(tokens, np.zeros(len(tokens), np.float32), next_item, offsets)
