"""Histories to recommend after, from a Parquet file of any size, a piece at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from prefixmem_jax.data.parquet_columns import is_list, of_any_length
from prefixmem_jax.errors import UserError

COLUMNS = {"user_id": "who it is", "item_ids": "list of item ids or keys, oldest first"}


class Piece(NamedTuple):
    """Some users.

    Attributes:
      users: as the file has them.
      histories: items by number, int64; what the catalogue has not is left out.
      unknown: how many were left out.
    """

    users: pa.Array
    histories: list[np.ndarray]
    unknown: int


class HistoryFile:
    """A Parquet file with columns `user_id` and `item_ids`; a context manager.

    Raises:
      UserError: names the file and what is wrong with it.
    """

    def __init__(self, path: Path):
        self.path = path
        with ExitStack() as stack:
            try:
                self._file = pq.ParquetFile(stack.enter_context(path.open("rb")))
            except (pa.ArrowException, OSError) as error:
                reason = getattr(error, "strerror", None) or str(error).partition("\n")[0]
                raise UserError(f"{path}: not a readable Parquet file ({reason})") from None
            schema = self._file.schema_arrow
            for column, meaning in COLUMNS.items():
                if column not in schema.names:
                    has = ", ".join(schema.names)
                    raise UserError(f"{path}: no column {column!r} ({meaning}); it has: {has}")
            kind = schema.field("item_ids").type
            inner = kind.value_type if is_list(kind) else None
            self.has_keys = inner is not None and (
                pa.types.is_string(inner) or pa.types.is_large_string(inner)
            )
            if not (self.has_keys or (inner is not None and pa.types.is_integer(inner))):
                raise UserError(
                    f"{path}: column 'item_ids' is {kind}, expected lists of integers or strings"
                )
            self.users = self._file.metadata.num_rows
            if not self.users:
                raise UserError(f"{path}: the file has no rows")
            self._open = stack.pop_all()

    def __enter__(self) -> HistoryFile:
        return self

    def __exit__(self, *exception: object) -> None:
        self._open.close()

    def pieces(self, size: int, items: int, keys: Sequence[str] | None) -> Iterator[Piece]:
        """All users in order, `size` at a time.

        Args:
          items: how many there are; keys: what their owner calls them.
        """
        if self.has_keys and keys is None:
            raise UserError(f"{self.path}: item_ids are text, and the catalogue has no keys")
        known = pa.array(keys, pa.string()) if self.has_keys else None
        first = 0
        for batch in self._file.iter_batches(size, columns=list(COLUMNS)):
            lists = of_any_length(batch["item_ids"])
            if batch["user_id"].null_count or lists.null_count:
                raise UserError(f"{self.path}: rows from {first} on hold a null")
            if known is None:
                given = lists.flatten().cast(pa.int64(), safe=False)  # beyond it none is known
                numbers = given.fill_null(-1).to_numpy(zero_copy_only=False)
            else:
                found = pc.index_in(lists.flatten().cast(pa.string()), value_set=known)
                numbers = found.fill_null(-1).to_numpy(zero_copy_only=False).astype(np.int64)
            there = (numbers >= 0) & (numbers < items)
            row = np.repeat(np.arange(len(batch)), lists.value_lengths().to_numpy())
            ends = np.cumsum(np.bincount(row[there], minlength=len(batch)))
            histories = np.split(numbers[there], ends[:-1])
            yield Piece(batch["user_id"], histories, int((~there).sum()))
            first += len(batch)
