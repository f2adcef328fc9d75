"""The online input pipeline: a Grain dataset over packed rows."""

from __future__ import annotations

import grain
import jax
import numpy as np

from prefixmem_jax.data.batch import Batch
from prefixmem_jax.errors import UserError


class _PackedRows(grain.sources.RandomAccessDataSource):
    def __init__(self, packed: Batch):
        self._packed = packed

    def __len__(self) -> int:
        return len(self._packed.tokens)

    def __getitem__(self, index: int) -> Batch:
        return Batch(*(array[index] for array in self._packed))

    def __repr__(self) -> str:
        return f"packed_rows({len(self)})"


def training_batches(packed: Batch, batch_size: int, seed: int) -> grain.DatasetIterator:
    """Endless shuffled batches of this process's share of the global batch.

    Reshuffled every epoch from `seed`. Process p of P takes every P-th row of the one global
    order, so that any number of processes sees the same global batches, and the iterator's
    state (the number of batches drawn) means the same to all of them.

    Args:
      packed: all rows there are.
      batch_size: rows in the *global* batch; must divide by the number of processes.
    """
    processes = jax.process_count()
    if batch_size % processes:
        raise UserError(f"data.batch_size={batch_size} does not divide by {processes} processes")
    if len(packed.tokens) < batch_size:
        raise UserError(
            f"data.batch_size={batch_size} rows, but the training data packs into only "
            f"{len(packed.tokens)} rows; use a smaller batch"
        )
    dataset = grain.MapDataset.source(_PackedRows(packed)).shuffle(seed=seed).repeat()
    share = dataset[jax.process_index() :: processes]
    return iter(share.batch(batch_size // processes).to_iter_dataset())


def global_batch(local: Batch, sharding: jax.sharding.Sharding) -> Batch:
    """This process's rows as its part of the global batch, on device."""
    return Batch(
        *(
            jax.make_array_from_process_local_data(sharding, np.ascontiguousarray(array))
            for array in local
        )
    )
