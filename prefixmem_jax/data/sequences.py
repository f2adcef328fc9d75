"""Histories as token sequences of fixed shape.

A *document* is `BOS, SID of item 1, SID of item 2, ...`. Training documents are packed offline
into rows so that the online pipeline reads fixed shapes from random-access arrays.

Every batch is a dict of arrays [rows, length]:
  tokens       int32, 0 after the last document
  segment_ids  int32, 1, 2, ... by document within the row, 0 for padding
  positions    int32, from 0 within each document
  loss_mask    float32, 1 where the *next* token is to be predicted
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from prefixmem_jax.data.splits import Example
from prefixmem_jax.errors import UserError
from prefixmem_jax.semantic_ids.catalog import Catalog

Rows = dict[str, np.ndarray]


def document(catalog: Catalog, items: Sequence[int] | np.ndarray) -> np.ndarray:
    """BOS and the SID tokens of the items in order: int32 [1 + levels * items]."""
    tokens = catalog.tokens[np.asarray(items, np.int64)].reshape(-1)
    return np.concatenate([[catalog.space.bos_token], tokens]).astype(np.int32)


def _empty_rows(rows: int, length: int) -> Rows:
    arrays: Rows = {
        name: np.zeros((rows, length), np.int32) for name in ("tokens", "segment_ids", "positions")
    }
    arrays["loss_mask"] = np.zeros((rows, length), np.float32)
    return arrays


def _place(rows: Rows, row: int, start: int, segment: int, tokens: np.ndarray) -> slice:
    span = slice(start, start + len(tokens))
    rows["tokens"][row, span] = tokens
    rows["segment_ids"][row, span] = segment
    rows["positions"][row, span] = np.arange(len(tokens))
    return span


def pack_training_rows(
    catalog: Catalog, sequences: Sequence[np.ndarray], length: int, max_items: int, seed: int
) -> Rows:
    """Packs training sequences into rows of `length` tokens.

    Sequences longer than `max_items` are cut into windows of that many items, the newest window
    full. Documents are packed by best fit in decreasing length, in an order fixed by `seed`.
    """
    levels = catalog.space.levels
    max_items = min(max_items, (length - 1) // levels)
    if max_items < 1:
        raise UserError(
            f"data.sequence_length={length} is too short: one item needs {levels + 1} tokens"
        )
    windows = []
    for items in sequences:
        windows += [
            items[max(0, end - max_items) : end] for end in range(len(items), 0, -max_items)
        ]
    rng = np.random.default_rng(seed)
    shuffled = [windows[i] for i in rng.permutation(len(windows))]
    shuffled.sort(key=len, reverse=True)  # stable: the order among equals is the seed's

    members: list[list[int]] = []
    by_space: list[list[int]] = [[] for _ in range(length + 1)]
    for index, window in enumerate(shuffled):
        need = 1 + levels * len(window)
        room = next((space for space in range(need, length + 1) if by_space[space]), None)
        if room is None:
            row, room = len(members), length
            members.append([])
        else:
            row = by_space[room].pop()
        members[row].append(index)
        by_space[room - need].append(row)

    rows = _empty_rows(len(members), length)
    for row, indices in enumerate(members):
        start = 0
        for segment, index in enumerate(indices, start=1):
            span = _place(rows, row, start, segment, document(catalog, shuffled[index]))
            rows["loss_mask"][row, span.start : span.stop - 1] = 1
            start = span.stop
    order = rng.permutation(len(members))
    return {name: array[order] for name, array in rows.items()}


def example_rows(catalog: Catalog, examples: Sequence[Example], max_items: int) -> Rows:
    """One row per example: history (its last `max_items` items), then the target.

    Only the target's tokens are to be predicted.
    """
    levels = catalog.space.levels
    rows = _empty_rows(len(examples), 1 + levels * (max_items + 1))
    for row, example in enumerate(examples):
        tokens = document(catalog, [*example.history[-max_items:], example.target])
        span = _place(rows, row, 0, 1, tokens)
        rows["loss_mask"][row, span.stop - 1 - levels : span.stop - 1] = 1
    return rows


def prompt_rows(catalog: Catalog, histories: Sequence[np.ndarray], max_items: int) -> Rows:
    """One row per history (its last `max_items` items), padded on the right."""
    rows = _empty_rows(len(histories), 1 + catalog.space.levels * max_items)
    for row, history in enumerate(histories):
        _place(rows, row, 0, 1, document(catalog, history[-max_items:]))
    return rows


def batches(rows: Rows, size: int) -> list[Rows]:
    """Cuts rows into batches of exactly `size`; the last is filled up with empty rows."""
    count = len(rows["tokens"])
    pieces = []
    for start in range(0, count, size):
        piece = {name: array[start : start + size] for name, array in rows.items()}
        missing = size - len(piece["tokens"])
        if missing:
            piece = {n: np.pad(a, ((0, missing), (0, 0))) for n, a in piece.items()}
        pieces.append(piece)
    return pieces
