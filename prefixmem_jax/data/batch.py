"""The one batch type: what a model that reads token sequences is given."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

Array = np.ndarray | jax.Array | jax.ShapeDtypeStruct


class Batch(NamedTuple):
    """Packed documents; a pytree of arrays [rows, length].

    Attributes:
      tokens: int32, 0 after the last document.
      segment_ids: int32, 1, 2, ... by document within the row, 0 for padding.
      positions: int32, from 0 within each document.
      loss_mask: float32, 1 where the *next* token is to be predicted.
    """

    tokens: Array
    segment_ids: Array
    positions: Array
    loss_mask: Array

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
        return cls(ids, ids, ids, mask)


def take_rows(batch: Batch, index: slice | np.ndarray) -> Batch:
    """Some rows of a batch."""
    return Batch(*(array[index] for array in batch))


def batches(batch: Batch, size: int) -> list[Batch]:
    """Cuts a batch into batches of exactly `size` rows; the last is filled up with empty rows."""
    pieces = []
    for start in range(0, len(batch.tokens), size):
        piece = take_rows(batch, slice(start, start + size))
        missing = size - len(piece.tokens)
        pieces.append(Batch(*(np.pad(array, ((0, missing), (0, 0))) for array in piece)))
    return pieces
