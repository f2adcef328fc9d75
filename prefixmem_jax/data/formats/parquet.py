"""The dataset format on disk, checked on the way in.

A dataset is a folder with two Parquet files (documented in docs/data.md):

- `items.parquet`: `item_id` int (each of 0..N-1 once), `title` string or null, and a SID column
  list<int> (codes by level, no offset; `sid` unless the config names another).
- `histories.parquet`: `user_id` string, `item_ids` list<int> oldest first, optionally
  `timestamps` list<int64> of the same length.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from prefixmem_jax.errors import UserError
from prefixmem_jax.files import replacing
from prefixmem_jax.semantic_ids.catalog import Catalog
from prefixmem_jax.semantic_ids.space import SidSpace

MAX_CODE = 1 << 24


@dataclass(frozen=True)
class Histories:
    """User histories, oldest item first, as one flat array and offsets into it.

    Attributes:
      items: int64 [interactions].
      offsets: int64 [users + 1]; user u has items[offsets[u]:offsets[u + 1]].
      user_ids: one string per user.
      timestamps: int64 [interactions], ascending within a user, or None.
    """

    items: np.ndarray
    offsets: np.ndarray
    user_ids: list[str]
    timestamps: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.user_ids)

    def of(self, user: int) -> np.ndarray:
        return self.items[self.offsets[user] : self.offsets[user + 1]]


@dataclass(frozen=True)
class Dataset:
    """A catalogue, the histories over it, and the digest of the files they came from."""

    name: str
    catalog: Catalog
    histories: Histories
    sha256: str


def load_dataset(
    folder: str | Path, sid_column: str = "sid", codebook_sizes: tuple[int, ...] | None = None
) -> Dataset:
    """Reads and checks a dataset folder.

    Args:
      folder: holds items.parquet and histories.parquet.
      sid_column: the column of items.parquet that holds the SIDs.
      codebook_sizes: codes per level; taken from the data (largest code + 1) where None.

    Raises:
      UserError: one line that names the file, the row (0-based) and the cause.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder}: not a folder with items.parquet and histories.parquet")
    items_path, histories_path = folder / "items.parquet", folder / "histories.parquet"
    catalog = _read_catalog(items_path, sid_column, codebook_sizes)
    histories = _read_histories(histories_path, len(catalog))
    digest = hashlib.sha256()
    for path in (items_path, histories_path):
        digest.update(hashlib.sha256(path.read_bytes()).digest())
    return Dataset(folder.resolve().name, catalog, histories, digest.hexdigest())


def save_dataset(folder: str | Path, dataset: Dataset) -> None:
    """Writes a dataset in the format `load_dataset` reads."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    catalog, histories = dataset.catalog, dataset.histories
    items = pa.table(
        {
            "item_id": np.arange(len(catalog)),
            "title": pa.array(catalog.titles, pa.string()),
            "sid": pa.array(list(catalog.sids), pa.list_(pa.int32())),
        }
    )
    columns = {
        "user_id": histories.user_ids,
        "item_ids": pa.ListArray.from_arrays(histories.offsets.astype(np.int32), histories.items),
    }
    if histories.timestamps is not None:
        columns["timestamps"] = pa.ListArray.from_arrays(
            histories.offsets.astype(np.int32), histories.timestamps
        )
    for name, table in (("items", items), ("histories", pa.table(columns))):
        with replacing(folder / f"{name}.parquet") as beside:
            pq.write_table(table, beside)


def _read_table(path: Path, required: dict[str, str]) -> pa.Table:
    if not path.is_file():
        raise UserError(
            f"{path}: no such file; a dataset needs items.parquet and histories.parquet"
        )
    try:
        table = pq.read_table(path)
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{path}: not a readable Parquet file ({_first_line(error)})") from None
    for column, meaning in required.items():
        if column not in table.column_names:
            found = ", ".join(table.column_names)
            raise UserError(f"{path}: no column {column!r} ({meaning}); the file has: {found}")
    if table.num_rows == 0:
        raise UserError(f"{path}: the file has no rows")
    return table


def _first_line(error: Exception) -> str:
    lines = str(error).splitlines()
    return lines[0] if lines else type(error).__name__


def _integer_lists(path: Path, table: pa.Table, column: str) -> tuple[np.ndarray, np.ndarray]:
    """A list<int> column as flat int64 values and int64 offsets [rows + 1]."""
    array = table[column].combine_chunks()
    if isinstance(array, pa.ChunkedArray):
        array = pa.concat_arrays(array.chunks)
    kind = array.type
    is_list = pa.types.is_list(kind) or pa.types.is_large_list(kind)
    if pa.types.is_fixed_size_list(kind):
        array, is_list = array.cast(pa.list_(kind.value_type)), True
    if not is_list or not pa.types.is_integer(kind.value_type):
        raise UserError(f"{path}: column {column!r} is {kind}, expected a list of integers")
    if array.null_count:
        row = int(np.flatnonzero(array.is_null().to_numpy(zero_copy_only=False))[0])
        raise UserError(f"{path}: row {row}: {column} is null, expected a list of integers")
    values, lengths = array.flatten(), array.value_lengths().to_numpy(zero_copy_only=False)
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    if values.null_count:
        at = int(np.flatnonzero(values.is_null().to_numpy(zero_copy_only=False))[0])
        row = int(np.searchsorted(offsets, at, side="right")) - 1
        raise UserError(f"{path}: row {row}: {column} holds a null, expected integers")
    return values.to_numpy(zero_copy_only=False).astype(np.int64), offsets


def _read_catalog(path: Path, sid_column: str, codebook_sizes: tuple[int, ...] | None) -> Catalog:
    table = _read_table(path, {"item_id": "int, 0..N-1", sid_column: "list of codes by level"})
    count = table.num_rows
    if not pa.types.is_integer(table["item_id"].type) or table["item_id"].null_count:
        raise UserError(f"{path}: column 'item_id' must hold integers without nulls")
    ids = table["item_id"].to_numpy().astype(np.int64)
    seen = np.full(count, -1, np.int64)
    for row, item in enumerate(ids):
        if not 0 <= item < count:
            raise UserError(
                f"{path}: row {row}: item_id {item} is outside 0..{count - 1}; "
                "ids must be dense from 0"
            )
        if seen[item] >= 0:
            raise UserError(f"{path}: row {row}: item_id {item} is already in row {seen[item]}")
        seen[item] = row
    codes, offsets = _integer_lists(path, table, sid_column)
    lengths = np.diff(offsets)
    levels = int(lengths[0])
    ragged = np.flatnonzero(lengths != levels)
    if len(ragged):
        row = int(ragged[0])
        raise UserError(
            f"{path}: row {row}: {sid_column} has {lengths[row]} codes, row 0 has {levels}"
        )
    if levels == 0:
        raise UserError(f"{path}: row 0: {sid_column} is empty")
    sids = codes.reshape(count, levels)
    if codebook_sizes is not None and len(codebook_sizes) != levels:
        raise UserError(
            f"{path}: {sid_column} has {levels} levels, data.codebook_sizes names "
            f"{len(codebook_sizes)}"
        )
    limits = np.full(levels, MAX_CODE) if codebook_sizes is None else np.asarray(codebook_sizes)
    bad = np.argwhere((sids < 0) | (sids >= limits))
    if len(bad):
        row, level = map(int, bad[0])
        raise UserError(
            f"{path}: row {row}: {sid_column} level {level + 1} is {sids[row, level]}, "
            f"expected 0..{limits[level] - 1}"
        )
    titles: list[str | None] = [None] * count
    if "title" in table.column_names:
        titles = table["title"].to_pylist()
    order = np.argsort(ids)
    sizes = codebook_sizes or tuple(int(size) for size in sids.max(axis=0) + 1)
    return Catalog(sids[order], [titles[i] for i in order], SidSpace(tuple(sizes)))


def _read_histories(path: Path, items: int) -> Histories:
    table = _read_table(path, {"user_id": "string", "item_ids": "list of item ids, oldest first"})
    flat, offsets = _integer_lists(path, table, "item_ids")
    lengths = np.diff(offsets)
    empty = np.flatnonzero(lengths == 0)
    if len(empty):
        raise UserError(f"{path}: row {int(empty[0])}: item_ids is empty")
    unknown = np.flatnonzero((flat < 0) | (flat >= items))
    if len(unknown):
        row = int(np.searchsorted(offsets, unknown[0], side="right")) - 1
        raise UserError(
            f"{path}: row {row}: unknown item {flat[unknown[0]]}; items.parquet has 0..{items - 1}"
        )
    timestamps = None
    if "timestamps" in table.column_names:
        timestamps, time_offsets = _integer_lists(path, table, "timestamps")
        differ = np.flatnonzero(np.diff(time_offsets) != lengths)
        if len(differ):
            row = int(differ[0])
            raise UserError(
                f"{path}: row {row}: {time_offsets[row + 1] - time_offsets[row]} timestamps for "
                f"{lengths[row]} items"
            )
        backwards = np.diff(timestamps) < 0
        backwards[offsets[1:-1] - 1] = False  # from one user to the next
        if backwards.any():
            at = int(np.flatnonzero(backwards)[0])
            row = int(np.searchsorted(offsets, at, side="right")) - 1
            raise UserError(f"{path}: row {row}: timestamps go backwards, expected oldest first")
    user_ids = [str(user) for user in table["user_id"].to_pylist()]
    return Histories(flat, offsets, user_ids, timestamps)
