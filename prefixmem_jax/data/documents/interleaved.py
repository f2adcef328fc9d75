"""Histories of titles and SIDs in turn: `BOS, title 1, SID 1, title 2, SID 2, ...`."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from prefixmem_jax.config_groups import Share
from prefixmem_jax.data.documents.document import (
    Corpus,
    Documents,
    Pool,
    Predicted,
    offsets_of,
)
from prefixmem_jax.data.documents.sequences import Sequences
from prefixmem_jax.data.splits import Ranges


@dataclass(frozen=True)
class Interleaved(Sequences):
    """Training sequences, each item as its title and its SID (paper, "Method", type 1).

    Attributes:
      sid_first: share of the documents in which the SID stands before the title.
      predicted: what is predicted: `everything`, or `sids`, or `text` alone.
    """

    sid_first: Share = 0.5
    predicted: Predicted = "everything"

    def documents(self, corpus: Corpus, rng: np.random.Generator) -> Documents:
        data, texts = corpus.data, corpus.texts
        longest = data.vocabulary.levels + int(texts.lengths.max(initial=0))
        ranges = self.ranges(corpus, longest, rng)
        items = data.split.items[ranges.indices()]
        pool = Pool(corpus)
        sid_first = np.repeat(rng.random(len(ranges)) < self.sid_first, ranges.lengths)

        # Of each document: BOS, then two pieces an item.
        per_document = 1 + 2 * ranges.lengths
        of_item = np.ones(per_document.sum(), bool)
        of_item[offsets_of(per_document)[:-1]] = False
        is_sid = np.zeros(len(of_item), bool)
        is_sid[of_item] = np.stack([sid_first, ~sid_first], axis=1).reshape(-1)
        is_text = of_item & ~is_sid
        bos, sids, titles = pool.bos(len(ranges)), pool.sids(items), pool.texts(items)
        starts, stops = (np.empty(len(of_item), np.int64) for _ in range(2))
        for where, piece in ((~of_item, bos), (is_sid, sids), (is_text, titles)):
            starts[where], stops[where] = piece.starts, piece.stops
        # Behind its title an item need not be guessed.
        guessed = np.zeros(len(of_item), np.int64)
        guessed[is_sid] = np.where(sid_first, items + 1, 0)
        predicted = {"everything": of_item, "sids": is_sid, "text": is_text}[self.predicted]
        return pool.documents(Ranges(starts, stops), per_document, predicted, guessed)
