"""The online input pipeline: a Grain dataset over packed rows."""

from __future__ import annotations

import grain
import jax
import numpy as np

from prefixmem_jax.data.sequences import Rows
from prefixmem_jax.errors import UserError


class _PackedRows(grain.sources.RandomAccessDataSource):
    def __init__(self, rows: Rows):
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows["tokens"])

    def __getitem__(self, index: int) -> Rows:
        return {name: array[index] for name, array in self._rows.items()}

    def __repr__(self) -> str:
        return f"packed_rows({len(self)})"


def training_batches(rows: Rows, batch_size: int, seed: int) -> grain.DatasetIterator:
    """Endless shuffled batches of this process's share of the global batch.

    Reshuffled every epoch from `seed`. Process p of P takes every P-th row of the one global
    order, so that any number of processes sees the same global batches, and the iterator's
    state (the number of batches drawn) means the same to all of them.

    Args:
      batch_size: rows in the *global* batch; must divide by the number of processes.
    """
    processes = jax.process_count()
    if batch_size % processes:
        raise UserError(f"data.batch_size={batch_size} does not divide by {processes} processes")
    if len(rows["tokens"]) < batch_size:
        raise UserError(
            f"data.batch_size={batch_size} rows, but the training data packs into only "
            f"{len(rows['tokens'])} rows; use a smaller batch"
        )
    dataset = grain.MapDataset.source(_PackedRows(rows)).shuffle(seed=seed).repeat()
    share = dataset[jax.process_index() :: processes]
    return iter(share.batch(batch_size // processes).to_iter_dataset())


def global_batch(local: Rows, sharding: jax.sharding.Sharding) -> dict[str, jax.Array]:
    """This process's rows as its part of the global batch, on device."""
    return {
        name: jax.make_array_from_process_local_data(sharding, np.ascontiguousarray(array))
        for name, array in local.items()
    }
