"""Documents as rows of one length, so that whatever reads them has fixed shapes."""

from __future__ import annotations

import bisect
from collections.abc import Sequence

import numpy as np

from prefixmem_jax.data.batch import Batch
from prefixmem_jax.data.documents.document import Documents, offsets_of
from prefixmem_jax.data.splits import Ranges
from prefixmem_jax.errors import UserError


def pack(
    documents: Documents, length: int, seed: int | Sequence[int], most: int | None = None
) -> Batch:
    """Packs documents into rows of `length` tokens, as many in each as fit.

    What lengths stand together the lengths alone decide; `seed`, which of the documents of a length
    go where, and the order of the rows.

    Args:
      most: no row has more documents; None: as many as there is room for.
    """
    _check(documents, length)
    rng = np.random.default_rng(seed)
    lengths = documents.lengths.astype(np.min_scalar_type(length))  # small ones are quickly sorted
    patterns = _patterns(np.bincount(lengths), length, most)
    # What patterns say of a row's documents, one pattern after the other.
    size = np.array([size for pattern, _ in patterns for size in pattern], lengths.dtype)
    of_pattern = offsets_of(np.array([len(pattern) for pattern, _ in patterns], np.int64))
    start = offsets_of(size)[:-1]
    number = np.arange(len(size))
    for array in (start, number):
        array -= np.repeat(array[of_pattern[:-1]], np.diff(of_pattern))
    # Rows, one pattern after the other too; a slot is the place of a document in one of them.
    pattern = np.repeat(np.arange(len(patterns)), np.array([n for _, n in patterns], np.int64))
    in_row = Ranges(of_pattern[pattern], of_pattern[pattern + 1])
    slot, row = in_row.indices(), np.repeat(rng.permutation(len(in_row)), in_row.lengths)
    by_size = rng.permutation(len(documents))
    by_size = by_size[np.argsort(lengths[by_size], kind="stable")]
    goes_to = np.empty_like(by_size)
    goes_to[by_size] = np.argsort(size[slot], kind="stable")
    row, slot = row[goes_to], slot[goes_to]
    return _filled(documents, len(in_row), length, row, start[slot], 1 + number[slot])


def _patterns(counts: np.ndarray, length: int, most: int | None) -> list[tuple[list[int], int]]:
    """Rows for so many documents of each length, by what is in them.

    The longest document that is left, and what fills its row best, as often as there are the
    documents for it: as many turns as there are lengths, or a few times that, however many
    documents there are.

    Returns:
      Lengths of a row's documents, and how many rows are so.
    """
    left = counts.tolist()
    there = [size for size, count in enumerate(left) if count]
    patterns = []

    def take(size: int, count: int) -> None:
        left[size] -= count
        if count and not left[size]:
            del there[bisect.bisect_left(there, size)]

    while there:
        row: dict[int, int] = {}
        space, places, added = length, most, [(there[-1], 1)]
        while added:
            for size, count in added:
                row[size] = row.get(size, 0) + count
                space, places = space - size * count, places and places - count
                take(size, count)
            end = bisect.bisect_right(there, space)
            fitting = there[max(0, end - _SEARCHED) : end]
            added = _filling(space, places, [(size, left[size]) for size in reversed(fitting)])
        more = min(left[size] // count for size, count in row.items())
        for size, count in row.items():
            take(size, count * more)
        patterns.append(([size for size, count in row.items() for _ in range(count)], 1 + more))
    return patterns


# Lengths that a row is filled from at a time: more find hardly fuller rows.
_SEARCHED = 64


def _filling(
    space: int, places: int | None, free: Sequence[tuple[int, int]]
) -> list[tuple[int, int]]:
    """Which documents fill a space best, of them the longest: length and count of each.

    Bounded subset sum, in the bits of one number: bit `sum` is set where documents sum to that.
    With limited places there are several such numbers in it, one for each count of documents.

    Args:
      places: for so many documents at most; None: for any number.
      free: lengths that fit, the longest first, and how many documents have them.
    """
    sums = (1 << space + 1) - 1
    apart = 0 if places is None else 2 * space + 1  # so that no sum runs into the next number
    numbers = range(1 if places is None else places + 1)
    ones = sum(1 << number * apart for number in numbers)
    reached, before = 1, []
    for size, count in free:
        before.append((size, reached))
        count, step = min(count, space // size), 1
        while count:
            step = min(step, count)
            reached |= (reached << step * (size + apart)) & (ones * sums)
            count, step = count - step, 2 * step
        if reached & (ones << space):  # shorter documents are easier to place: they are kept
            break
    full, number = max(((reached >> n * apart & sums).bit_length() - 1, -n) for n in numbers)
    at, filling = full - number * apart, []
    for size, earlier in reversed(before):
        count = 0
        while not earlier >> at & 1:
            at, count = at - size - apart, count + 1
        if count:
            filling.append((size, count))
    return filling


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
    flat = Batch(*(array.reshape(-1) for array in batch))
    for first in range(0, len(documents), _PIECE):  # what is in between stays small
        offsets = documents.offsets[first : first + _PIECE + 1]
        lengths, there = np.diff(offsets), slice(offsets[0], offsets[-1])
        piece = slice(first, first + _PIECE)
        at = np.arange(there.start, there.stop)
        position = at - np.repeat(offsets[:-1], lengths)
        target = at + np.repeat(row[piece] * length + start[piece] - offsets[:-1], lengths)
        flat.tokens[target] = documents.tokens[there]
        flat.segment_ids[target] = np.repeat(segment[piece], lengths)
        flat.positions[target] = position
        flat.loss_mask[target] = documents.loss_mask[there]
        flat.next_item[target] = documents.next_item[there]
    return batch


# Documents that are written at a time.
_PIECE = 1 << 14
