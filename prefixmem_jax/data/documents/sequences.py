"""Which pieces of the training sequences make documents."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from pydantic import NonNegativeInt

from prefixmem_jax.config_groups import DataConfig
from prefixmem_jax.data.documents.document import Corpus, DocumentsConfig
from prefixmem_jax.data.splits import Ranges
from prefixmem_jax.errors import UserError


@dataclass(frozen=True)
class Sequences(DocumentsConfig):
    """Base of the documents that are made of training sequences.

    Attributes:
      draws: random sub-sequences of every training sequence, each of which ends at a random item
        and has as many before it as a document holds (paper, "Setup": sub-sequences of up to 32
        engagements); 0: all of it once, cut where it is longer.
    """

    draws: NonNegativeInt = field(default=0, kw_only=True)

    def ranges(self, corpus: Corpus, item_length: int, rng: np.random.Generator) -> Ranges:
        """Of the items of each document.

        Args:
          item_length: the most tokens that an item has in a document.

        Raises:
          UserError: one item is longer than a packed row.
        """
        most = most_items(corpus.config, corpus.config.max_items, item_length)
        if self.draws:
            return subsequences(corpus.train, most, self.draws, rng)
        return windows(corpus.train, most)


def most_items(config: DataConfig, most: int, item_length: int) -> int:
    """How many items a document holds, `most` if there is room."""
    most = min(most, (config.sequence_length - 1) // item_length)
    if most < 1:
        raise UserError(
            f"data.sequence_length={config.sequence_length} is too short: one item needs "
            f"{1 + item_length} tokens"
        )
    return most


def windows(ranges: Ranges, most: int) -> Ranges:
    """Sequences of no more items than `most`, every item once; the newest window is full."""
    count = -(-ranges.lengths // most)
    sequence = np.repeat(np.arange(len(ranges)), count)
    newer = np.arange(len(sequence)) - np.repeat(np.cumsum(count) - count, count)
    stops = ranges.stops[sequence] - newer * most
    return Ranges(np.maximum(ranges.starts[sequence], stops - most), stops)


def subsequences(ranges: Ranges, most: int, draws: int, rng: np.random.Generator) -> Ranges:
    """Of each sequence `draws` that end at any item but the first, if there is another one."""
    sequence = np.repeat(np.arange(len(ranges)), draws)
    starts, lengths = ranges.starts[sequence], ranges.lengths[sequence]
    first = np.minimum(lengths, 2)
    kept = first + (rng.random(len(sequence)) * (lengths - first + 1)).astype(np.int64)
    stops = starts + kept
    return Ranges(np.maximum(starts, stops - most), stops)
