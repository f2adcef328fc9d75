"""Documents as rows of one length, so that whatever reads them has fixed shapes."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from prefixmem_jax.data.batch import Batch
from prefixmem_jax.data.documents.document import Documents
from prefixmem_jax.errors import UserError


def pack(
    documents: Documents, length: int, seed: int | Sequence[int], most: int | None = None
) -> Batch:
    """Packs documents into rows of `length` tokens, as many in each as fit.

    By best fit in decreasing length; `seed` fixes the order among equals and that of the rows.

    Args:
      most: no row has more documents; None: as many as there is room for.
    """
    _check(documents, length)
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(documents))
    lengths = documents.lengths
    order = order[np.argsort(-lengths[order], kind="stable")]
    row = np.empty(len(documents), np.int64)
    start = np.empty(len(documents), np.int64)
    segment = np.empty(len(documents), np.int64)

    segments: list[int] = []  # documents in each row so far
    by_space: list[list[int]] = [[] for _ in range(length + 1)]  # rows with so many tokens left
    spaces = 0  # bit s: by_space[s] is not empty
    for document, need in zip(order.tolist(), lengths[order].tolist(), strict=True):
        large = spaces >> need
        if large:
            space = need + (large & -large).bit_length() - 1
            chosen = by_space[space].pop()
            if not by_space[space]:
                spaces ^= 1 << space
        else:
            space, chosen = length, len(segments)
            segments.append(0)
        segments[chosen] += 1
        row[document], start[document], segment[document] = (
            chosen,
            length - space,
            segments[chosen],
        )
        if segments[chosen] != most:
            by_space[space - need].append(chosen)
            spaces |= 1 << (space - need)

    shuffled = np.empty(len(segments), np.int64)
    shuffled[rng.permutation(len(segments))] = np.arange(len(segments))
    return _filled(documents, len(segments), length, shuffled[row], start, segment)


def one_per_row(documents: Documents, length: int) -> Batch:
    """One document a row, in order, padded on the right to `length` tokens."""
    _check(documents, length)
    row = np.arange(len(documents))
    return _filled(documents, len(row), length, row, np.zeros_like(row), np.ones_like(row))


def _check(documents: Documents, length: int) -> None:
    longest = int(documents.lengths.max(initial=0))
    if longest > length:
        raise UserError(f"rows of {length} tokens are too short: a document has {longest}")


def _filled(
    documents: Documents,
    rows: int,
    length: int,
    row: np.ndarray,
    start: np.ndarray,
    segment: np.ndarray,
) -> Batch:
    """Documents written where they go: each one's row, first column and number within the row."""
    batch = Batch.zeros(rows, length)
    lengths = documents.lengths
    position = np.arange(len(documents.tokens)) - np.repeat(documents.offsets[:-1], lengths)
    target = np.repeat(row * length + start, lengths) + position
    for array, values in (
        (batch.tokens, documents.tokens),
        (batch.segment_ids, np.repeat(segment, lengths)),
        (batch.positions, position),
        (batch.loss_mask, documents.loss_mask),
        (batch.next_item, documents.next_item),
    ):
        array.reshape(-1)[target] = values
    return batch
