"""The online input pipeline: a Grain dataset over packed rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import grain
import jax
import numpy as np

from prefixmem_jax.data.batch import Rows, take_rows
from prefixmem_jax.errors import UserError

# Batches are read ahead by these; so many are held at most.
READING = grain.ReadOptions(num_threads=16, prefetch_buffer_size=16)


class RowSource(Protocol):
    """Rows by their number, one or several."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Rows: ...

    def take(self, indices: Sequence[int]) -> Rows: ...


class RowsInMemory:
    """Rows of host arrays, or of what can be indexed like one, by their number."""

    def __init__(self, rows: Rows):
        self._rows = rows

    def __len__(self) -> int:
        return len(jax.tree.leaves(self._rows)[0])

    def __getitem__(self, index: int) -> Rows:
        return take_rows(self._rows, index)

    def take(self, indices: Sequence[int]) -> Rows:
        """Some rows, in this order."""
        return take_rows(self._rows, np.asarray(indices))


def training_batches(source: RowSource, batch_size: int, seed: int) -> grain.DatasetIterator:
    """Endless shuffled batches of this process's share of the global batch.

    Reshuffled every epoch from `seed`. Process p of P takes every P-th row of the one global
    order, so that any number of processes sees the same global batches, and the iterator's
    state (the number of batches drawn) means the same to all of them.

    Args:
      source: all rows there are to learn from.
      batch_size: rows in the *global* batch; must divide by the number of processes.
    """
    processes = jax.process_count()
    if batch_size % processes:
        raise UserError(f"data.batch_size={batch_size} does not divide by {processes} processes")
    if len(source) < batch_size:
        raise UserError(
            f"data.batch_size={batch_size} rows, but the training data packs into only "
            f"{len(source)} rows; use a smaller batch"
        )
    order = _in_order(len(source), seed)[jax.process_index() :: processes]
    # Numbers go through the pipeline: rows would do so one by one.
    share = order.batch(batch_size // processes).map(source.take)
    return iter(share.to_iter_dataset(READING))


def rows_of_batch(number: int, rows: int, batch_size: int, seed: int) -> list[int]:
    """Which rows a global batch of `training_batches` has; number 1 is the first, that of step 1.

    Args:
      rows: how many there are to learn from.
    """
    order = _in_order(rows, seed)
    return [order[place] for place in range((number - 1) * batch_size, number * batch_size)]


def _in_order(rows: int, seed: int) -> grain.MapDataset:
    """The one global order: numbers of all rows, reshuffled every epoch, without an end."""
    return grain.MapDataset.range(rows).shuffle(seed=seed).repeat()


def global_batch(local: Rows, sharding: jax.sharding.Sharding) -> Rows:
    """This process's rows as its share of the global batch, on device."""
    return jax.tree.map(
        lambda array: jax.make_array_from_process_local_data(sharding, np.ascontiguousarray(array)),
        local,
    )
