"""Users' histories in a Parquet file, checked on the way in: all of them, or a piece at a time."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from prefixmem_jax.data.dataset import Histories
from prefixmem_jax.data.parquet_columns import integer_lists, opened, texts
from prefixmem_jax.errors import UserError
from prefixmem_jax.text import shortened

COLUMNS = {"user_id": "string", "item_ids": "list of item ids, oldest first"}
# Users that are read at a time.
_PIECE = 1 << 14


def read_histories(path: Path, items: int) -> Histories:
    """All of a file's.

    Args:
      items: how many the catalogue has.

    Raises:
      UserError: names the file, the row (from 0) and the cause.
    """
    histories = _joined(_pieces(path, items))
    _check_each_once(path, _hashes(histories))
    return histories


class StoredHistories:
    """Histories of a file, of which nothing but `offsets` is kept in memory.

    Attributes:
      offsets: as in `Histories`, which this stands in for.
    """

    def __init__(self, path: Path, items: int):
        """Reads all of it once, and checks it; as `read_histories`."""
        self._path, self._items = path, items
        lengths, hashes = [], []
        for piece in _pieces(path, items):
            lengths.append(np.diff(piece.offsets))
            hashes.append(_hashes(piece))
        _check_each_once(path, np.concatenate(hashes))
        self.offsets = np.concatenate([[0], np.cumsum(np.concatenate(lengths))])

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def piece(self, first: int, stop: int) -> Histories:
        """Of the users from the first up to the last."""
        return _joined(_pieces(self._path, self._items, first, stop))

    @property
    def timestamps(self) -> np.ndarray | None:
        """Of all interactions, int64, or None: read anew."""
        found = np.empty(self.offsets[-1], np.int64)
        done = 0
        for piece in _pieces(self._path, self._items):
            if piece.timestamps is None:
                return None
            found[done : done + len(piece.items)] = piece.timestamps
            done += len(piece.items)
        return found


def _joined(pieces: Iterable[Histories]) -> Histories:
    pieces = list(pieces)
    times = [piece.timestamps for piece in pieces if piece.timestamps is not None]
    lengths = np.concatenate([np.diff(piece.offsets) for piece in pieces])
    return Histories(
        np.concatenate([piece.items for piece in pieces]),
        np.concatenate([[0], np.cumsum(lengths)]),
        [user for piece in pieces for user in piece.user_ids],
        np.concatenate(times) if times else None,
    )


def _pieces(path: Path, items: int, first: int = 0, stop: int | None = None) -> Iterator[Histories]:
    """Users from the first up to the last, in order."""
    with opened(path, COLUMNS) as file:
        columns = [name for name in (*COLUMNS, "timestamps") if name in file.schema_arrow.names]
        stop = file.metadata.num_rows if stop is None else stop
        groups, row = _row_groups(file.metadata, first, stop)
        # What runs in a forked process has no threads.
        for batch in file.iter_batches(_PIECE, groups, columns, use_threads=False):
            begin, end = max(first - row, 0), min(stop - row, len(batch))
            if begin < end:
                table = pa.table(batch.slice(begin, end - begin))
                yield _checked(path, table, items, row + begin)
            row += len(batch)


def _row_groups(metadata: pq.FileMetaData, first: int, stop: int) -> tuple[list[int], int]:
    """Those that hold the rows, and the first row of the first of them."""
    rows = [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]
    ends = np.cumsum(rows)
    begin = int(np.searchsorted(ends, first, side="right"))
    end = int(np.searchsorted(ends, stop)) + 1
    return [*range(begin, min(end, len(rows)))], int(ends[begin] - rows[begin])


def _checked(path: Path, table: pa.Table, items: int, first: int) -> Histories:
    """What rows of a file say; the first of them is `first`."""
    flat, offsets = integer_lists(path, "item_ids", table["item_ids"], first)

    def row_of(at: np.ndarray) -> int:
        """Of the first of some interactions."""
        return first + int(np.searchsorted(offsets, at[0], side="right")) - 1

    lengths = np.diff(offsets)
    empty = np.flatnonzero(lengths == 0)
    if len(empty):
        raise UserError(f"{path}: row {first + int(empty[0])}: item_ids is empty")
    unknown = np.flatnonzero((flat < 0) | (flat >= items))
    if len(unknown):
        raise UserError(
            f"{path}: row {row_of(unknown)}: unknown item {flat[unknown[0]]}; items.parquet has "
            f"0..{items - 1}"
        )
    times = None
    if "timestamps" in table.column_names:
        times, time_offsets = integer_lists(path, "timestamps", table["timestamps"], first)
        differ = np.flatnonzero(np.diff(time_offsets) != lengths)
        if len(differ):
            row = int(differ[0])
            count = time_offsets[row + 1] - time_offsets[row]
            raise UserError(
                f"{path}: row {first + row}: {count} timestamps for {lengths[row]} items"
            )
        backwards = np.diff(times) < 0
        backwards[offsets[1:-1] - 1] = False  # from one user to the next
        if backwards.any():
            row = row_of(np.flatnonzero(backwards))
            raise UserError(f"{path}: row {row}: timestamps go backwards, expected oldest first")
    return Histories(flat, offsets, _user_ids(path, table["user_id"], first), times)


def _user_ids(path: Path, column: pa.ChunkedArray, first: int) -> list[str]:
    if not pa.types.is_integer(column.type):
        column = texts(path, "user_id", column, first)
    if column.null_count:
        row = first + column.to_pylist().index(None)
        raise UserError(f"{path}: row {row}: user_id is null")
    return [str(user) for user in column.to_pylist()]


def _hashes(histories: Histories) -> np.ndarray:
    """Of the users' ids, int64, for this process alone."""
    return np.fromiter(map(hash, histories.user_ids), np.int64, len(histories))


def _check_each_once(path: Path, hashes: np.ndarray) -> None:
    """Splits and comparisons tell users apart by their ids."""
    ordered = np.sort(hashes)
    again = np.unique(ordered[1:][ordered[1:] == ordered[:-1]])
    if not len(again):
        return
    row_of_user: dict[str, int] = {}
    with opened(path, COLUMNS) as file:
        users = _user_ids(path, file.read(["user_id"])["user_id"], 0)
    for row in np.flatnonzero(np.isin(hashes, again)).tolist():
        first = row_of_user.setdefault(users[row], row)
        if first != row:
            raise UserError(
                f"{path}: row {row}: user_id {shortened(users[row])} is already in row {first}; "
                "expected one row a user"
            )
