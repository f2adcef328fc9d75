"""Documents, and what a kind of them says: token sequences before packing."""

from __future__ import annotations

import abc
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import numpy as np
from pydantic import PositiveFloat

from prefixmem_jax.config_groups import DataConfig
from prefixmem_jax.data.prepare import PreparedData
from prefixmem_jax.data.splits import Ranges
from prefixmem_jax.data.texts import ItemTexts, item_texts
from prefixmem_jax.errors import UserError
from prefixmem_jax.kinds import Kind, kind_name

# What of a document with text is predicted.
Predicted = Literal["everything", "sids", "text"]


@dataclass(frozen=True)
class Documents:
    """Token sequences of any lengths, in flat arrays.

    Attributes:
      tokens: int32 [tokens].
      loss_mask: float32 [tokens], above 0 where the *next* token is to be predicted: its weight.
      next_item: int32 [tokens], 1 + the item that starts with the next token; 0 where none does, or
        where the text before it tells which.
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

    def take(self, indices: np.ndarray) -> Documents:
        """Some of the documents, in the order of `indices`, which may repeat."""
        ranges = Ranges(self.offsets[:-1], self.offsets[1:]).take(indices)
        at = ranges.indices()
        return Documents(
            self.tokens[at], self.loss_mask[at], self.next_item[at], offsets_of(ranges.lengths)
        )


def offsets_of(lengths: np.ndarray) -> np.ndarray:
    """Where sequences of these lengths start, one after the other, and where they end."""
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths, dtype=np.int64)])


@dataclass(frozen=True)
class Corpus:
    """What documents are made of: a split dataset, and how long they may be.

    Attributes:
      data: its histories are all that there are, or those of this part alone.
      part: of how many `parts`, which have all documents between them, this one is.
      counts: documents of each kind that all parts have, `NextToken.count_documents`; None where
        this is all.
    """

    data: PreparedData
    config: DataConfig
    part: int = 0
    parts: int = 1
    counts: tuple[int, ...] | None = None

    @property
    def texts(self) -> ItemTexts:
        """The items' titles in tokens."""
        return item_texts(self.data.catalog, self.config)

    @property
    def train(self) -> Ranges:
        """The training sequences of this part."""
        return self.data.split.train

    def share(self, count: int) -> np.ndarray:
        """Which of `count` items this part makes documents of by themselves, int64."""
        return np.arange(self.part, count, self.parts)


@dataclass(frozen=True)
class DocumentsConfig(Kind, abc.ABC):
    """Base of the kinds of documents.

    Attributes:
      weight: how many documents of this kind there are, relative to the other kinds' weights.
    """

    package: ClassVar[str] = "prefixmem_jax.data.documents"
    # Whether nothing but the codes of SIDs is predicted.
    sids_alone: ClassVar[bool] = False

    weight: PositiveFloat = field(default=1.0, kw_only=True)

    @abc.abstractmethod
    def documents(self, corpus: Corpus, rng: np.random.Generator) -> Documents:
        """All that the training sequences and their items have to say, each once.

        Args:
          rng: of what it draws.

        Raises:
          UserError: one item is longer than `data.sequence_length`, or there is no text.
        """

    def longest(self, config: DataConfig, levels: int) -> int:
        """No document has more tokens; those of items have SIDs of so many levels."""
        del levels
        return config.sequence_length


def mixture(
    kinds: Sequence[DocumentsConfig], corpus: Corpus, seed: int | Sequence[int]
) -> Documents:
    """Documents of several kinds, as many of each as its weight says.

    Those of one kind are all there at least once. Kinds that would be too few for their weight are
    there several times, every document as often as every other but for one time. Of a part of a
    corpus each document is there as often, on average, as of the whole.
    """
    rng = np.random.default_rng(seed)
    pools = [kind.documents(corpus, rng) for kind in kinds]
    if len(pools) == 1:
        return pools[0]
    counts = corpus.counts or [len(pool) for pool in pools]
    for kind, count in zip(kinds, counts, strict=True):
        if not count:
            raise UserError(f"objective.documents: {kind_name(type(kind))} finds nothing to say")
    times = max(count / kind.weight for kind, count in zip(kinds, counts, strict=True))
    taken = []
    for kind, pool, count in zip(kinds, pools, counts, strict=True):
        exact = len(pool) * times * kind.weight / count
        # Of many small parts all would be rounded the same way.
        more = 0.5 if corpus.counts is None else rng.random()
        taken.append(pool.take(_spread(len(pool), int(exact + more), rng)))
    return Documents(
        np.concatenate([pool.tokens for pool in taken]),
        np.concatenate([pool.loss_mask for pool in taken]),
        np.concatenate([pool.next_item for pool in taken]),
        offsets_of(np.concatenate([pool.lengths for pool in taken])),
    )


def _spread(size: int, count: int, rng: np.random.Generator) -> np.ndarray:
    """`count` indices below `size`, each as often as any other but for one time."""
    whole, rest = divmod(count, max(size, 1))
    return np.concatenate([np.tile(np.arange(size), whole), rng.permutation(size)[:rest]])


class Pool:
    """Everything that documents with text are made of, as ranges of one array of tokens."""

    def __init__(self, corpus: Corpus, *more: Sequence[int]):
        """Takes the items' SIDs and texts, BOS, and further pieces."""
        vocabulary, texts = corpus.data.vocabulary, corpus.texts
        item_tokens = corpus.data.item_tokens
        self._levels = vocabulary.levels
        self._texts = texts.offsets + item_tokens.size
        others = [[vocabulary.bos_token], *map(list, more)]
        self._others = offsets_of([len(piece) for piece in others]) + self._texts[-1]
        self.tokens = np.concatenate(
            [item_tokens.reshape(-1), texts.tokens, *others], dtype=np.int32
        )

    def sids(self, items: np.ndarray) -> Ranges:
        return Ranges(items * self._levels, (items + 1) * self._levels)

    def texts(self, items: np.ndarray) -> Ranges:
        return Ranges(self._texts[items], self._texts[items + 1])

    def bos(self, count: int) -> Ranges:
        return self.other(-1, count)

    def other(self, number: int, count: int) -> Ranges:
        """One of the further pieces, so many times."""
        start, stop = self._others[number + 1 : number + 3]
        return Ranges(np.full(count, start), np.full(count, stop))

    def documents(
        self, pieces: Ranges, per_document: np.ndarray, predicted: np.ndarray, items: np.ndarray
    ) -> Documents:
        """Documents out of pieces, one after the other.

        The first piece of each is `bos`, which is not to be predicted.

        Args:
          pieces: of `tokens`.
          per_document: how many pieces each document has, int64.
          predicted: whether a piece's tokens are to be predicted, bool.
          items: 1 + the item to be guessed where a piece starts, 0 where none is, int.
        """
        starts = offsets_of(pieces.lengths)
        offsets = starts[offsets_of(per_document)]
        tokens = self.tokens[pieces.indices()]
        loss_mask = np.zeros(len(tokens), np.float32)
        loss_mask[:-1] = np.repeat(predicted, pieces.lengths)[1:]
        next_item = np.zeros(len(tokens), np.int32)
        guessed = items > 0
        next_item[starts[:-1][guessed] - 1] = items[guessed]
        return Documents(tokens, loss_mask, next_item, offsets)
