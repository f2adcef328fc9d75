"""The one batch type of token sequences, and cutting rows into batches."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

# Any pytree of host arrays, or of what is indexed like one, with one row per example: a `Batch`.
Rows = Any
Array = np.ndarray | jax.Array | jax.ShapeDtypeStruct


class Batch(NamedTuple):
    """Packed documents; a pytree of arrays [rows, length].

    Attributes:
      tokens: int32, 0 after the last document.
      segment_ids: int32, 1, 2, ... by document within the row, 0 for padding.
      positions: int32, from 0 within each document.
      loss_mask: float32, above 0 where the *next* token is to be predicted: its weight, mostly 1.
      next_item: int32, 1 + the item that starts with the next token; 0 where none does.
    """

    tokens: Array
    segment_ids: Array
    positions: Array
    loss_mask: Array
    next_item: Array

    @classmethod
    def zeros(cls, rows: int, length: int) -> Batch:
        """Empty rows on the host."""
        return cls(*(np.zeros(leaf.shape, leaf.dtype) for leaf in cls.abstract(rows, length)))

    @classmethod
    def abstract(
        cls, rows: int, length: int, sharding: jax.sharding.Sharding | None = None
    ) -> Batch:
        """Shapes and dtypes."""
        ids = jax.ShapeDtypeStruct((rows, length), jnp.int32, sharding=sharding)
        mask = jax.ShapeDtypeStruct((rows, length), jnp.float32, sharding=sharding)
        return cls(ids, ids, ids, mask, ids)


def count_rows(rows: Rows) -> int:
    """How many rows host arrays have."""
    return len(jax.tree.leaves(rows)[0])


def take_rows(rows: Rows, index: Any) -> Rows:
    """Some rows of host arrays: an index, a slice, or an array of indices."""
    return jax.tree.map(lambda array: array[index], rows)


def batches(rows: Rows, size: int) -> list[Rows]:
    """Cuts rows into batches of exactly `size`; the last is filled up with empty (zero) rows."""

    def cut(array: np.ndarray, start: int) -> np.ndarray:
        piece = array[start : start + size]
        return np.pad(piece, ((0, size - len(piece)), *((0, 0),) * (array.ndim - 1)))

    return [
        jax.tree.map(lambda array, start=start: cut(array, start), rows)
        for start in range(0, count_rows(rows), size)
    ]
