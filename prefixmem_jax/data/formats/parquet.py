"""The dataset format on disk, checked on the way in.

A dataset is a folder with two Parquet files (documented in docs/data.md):

- `items.parquet`: `item_id` int (each of 0..N-1 once), `title` string or null, maybe `key` string
  (what the items' owner calls them, each once), and a SID column
  list<int> (codes by level, no offset; `sid` unless the config names another). Column `item_id`
  itself, as SIDs, gives every item one code of its own.
- `histories.parquet`: `user_id` string (each once), `item_ids` list<int> oldest first, optionally
  `timestamps` list<int64> of the same length.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from prefixmem_jax.data.dataset import ITEM_ID, Dataset, Histories
from prefixmem_jax.data.parquet_columns import integer_lists, opened, texts
from prefixmem_jax.data.stored_histories import StoredHistories, read_histories
from prefixmem_jax.errors import UserError
from prefixmem_jax.files import replacing, sha256_of
from prefixmem_jax.semantic_ids.catalog import MAX_CODES, STATE_CODES, Catalog
from prefixmem_jax.semantic_ids.space import SidSpace
from prefixmem_jax.storage import absolute, to_path
from prefixmem_jax.text import shortened

ITEMS = "items.parquet"
HISTORIES = "histories.parquet"


def read_dataset(
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
    return _dataset(folder, sid_column, codebook_sizes, read_histories)


def open_dataset(
    folder: str | Path, sid_column: str = "sid", codebook_sizes: tuple[int, ...] | None = None
) -> Dataset:
    """As `read_dataset`, all checked, but of the histories only a piece is ever in memory."""
    return _dataset(folder, sid_column, codebook_sizes, StoredHistories)


def _dataset(
    folder: str | Path,
    sid_column: str,
    codebook_sizes: tuple[int, ...] | None,
    histories: Callable[[Path, int], Histories | StoredHistories],
) -> Dataset:
    folder = to_path(folder)
    catalog = read_catalog(folder, sid_column, codebook_sizes)
    found = histories(folder / HISTORIES, len(catalog))
    digest = hashlib.sha256(sha256_of(folder / ITEMS) + sha256_of(folder / HISTORIES))
    return Dataset(absolute(folder).name, catalog, found, digest.hexdigest())


def read_catalog(
    folder: str | Path, sid_column: str = "sid", codebook_sizes: tuple[int, ...] | None = None
) -> Catalog:
    """Reads and checks items.parquet alone; as `read_dataset`."""
    folder = to_path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder}: not a folder with {ITEMS} and {HISTORIES}")
    path = folder / ITEMS
    table = _read_table(
        path, {"item_id": "int, 0..N-1", sid_column: "list of codes by level"}, ("title", "key")
    )
    row_of_item = _row_of_item(path, table)
    sids = _read_sids(path, table, sid_column, codebook_sizes)[row_of_item]
    titles = _titles(path, table, row_of_item)
    sizes = codebook_sizes or tuple(int(size) for size in sids.max(axis=0) + 1)
    return Catalog(sids, titles, SidSpace(tuple(sizes)), _keys(path, table, row_of_item))


def read_titles(folder: str | Path) -> tuple[list[str | None], list[str] | None]:
    """Titles and keys of items 0..N-1, which need no SIDs yet; None where there are none."""
    path = to_path(folder) / ITEMS
    table = _read_table(path, {"item_id": "int, 0..N-1"}, ("title", "key"))
    row_of_item = _row_of_item(path, table)
    return _titles(path, table, row_of_item), _keys(path, table, row_of_item)


def _titles(path: Path, table: pa.Table, row_of_item: np.ndarray) -> list[str | None]:
    if "title" not in table.column_names:
        return [None] * len(row_of_item)
    return texts(path, "title", table["title"]).take(row_of_item).to_pylist()


def _keys(path: Path, table: pa.Table, row_of_item: np.ndarray) -> list[str] | None:
    if "key" not in table.column_names:
        return None
    keys = texts(path, "key", table["key"]).take(row_of_item).to_pylist()
    item_of_key: dict[str, int] = {}
    for item, key in enumerate(keys):
        if key is None:
            raise UserError(f"{path}: row {row_of_item[item]}: key is null")
        if item_of_key.setdefault(key, item) != item:
            first = row_of_item[item_of_key[key]]
            raise UserError(
                f"{path}: row {row_of_item[item]}: key {shortened(key)} is already in row {first}"
            )
    return keys


def write_dataset(folder: str | Path, dataset: Dataset) -> None:
    """Writes a dataset in the format that `read_dataset` reads."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    histories = dataset.histories
    write_items(folder, dataset.catalog)
    users = {
        "user_id": histories.user_ids,
        "item_ids": _lists(histories.offsets, histories.items),
    }
    if histories.timestamps is not None:
        users["timestamps"] = _lists(histories.offsets, histories.timestamps)
    _write(folder / HISTORIES, users)


def write_items(folder: Path, catalog: Catalog) -> None:
    """Writes items.parquet alone."""
    codes = np.arange(len(catalog) + 1) * catalog.space.levels
    items = {
        "item_id": np.arange(len(catalog)),
        "title": pa.array(catalog.titles, pa.string()),
        "sid": _lists(codes, catalog.sids.reshape(-1)),
    }
    if catalog.keys is not None:
        items["key"] = pa.array(catalog.keys, pa.string())
    _write(folder / ITEMS, items)


def write_pieces(folder: Path, kind: str, pieces: Iterable[dict[str, Any]]) -> None:
    """Writes `items` or `histories` piece by piece, and holds one at a time.

    Args:
      pieces: columns by name; lists as a 2-d array, or as (lengths, values).
    """
    writer = None
    with replacing(folder / {"items": ITEMS, "histories": HISTORIES}[kind]) as beside:
        try:
            for piece in pieces:
                table = pa.table({name: _column(column) for name, column in piece.items()})
                writer = writer or pq.ParquetWriter(beside, table.schema)
                writer.write_table(table)
        finally:
            if writer is not None:
                writer.close()


def _column(column: Any) -> Any:
    if isinstance(column, tuple):
        lengths, values = column
        return _lists(np.concatenate([[0], np.cumsum(lengths)]), values)
    if isinstance(column, np.ndarray) and column.ndim == 2:
        return _lists(np.arange(len(column) + 1) * column.shape[1], column.reshape(-1))
    return column


def _write(path: Path, columns: dict[str, Any]) -> None:
    with replacing(path) as beside:
        pq.write_table(pa.table(columns), beside)


def _lists(offsets: np.ndarray, values: np.ndarray) -> pa.ListArray:
    return pa.ListArray.from_arrays(offsets.astype(np.int32), values)


def _read_table(path: Path, required: dict[str, str], optional: Sequence[str]) -> pa.Table:
    """The columns that are asked for; others may be large (embeddings) and are not read."""
    with opened(path, required) as file:
        names = file.schema_arrow.names
        return file.read([name for name in names if name in (*required, *optional)])


def _row_of_item(path: Path, table: pa.Table) -> np.ndarray:
    """The row of every item 0..N-1, int64 [items]."""
    count = table.num_rows
    if not pa.types.is_integer(table["item_id"].type) or table["item_id"].null_count:
        raise UserError(f"{path}: column 'item_id' must hold integers without nulls")
    ids = table["item_id"].to_numpy().astype(np.int64)
    row_of_item = np.argsort(ids, kind="stable")
    ordered = ids[row_of_item]
    again = np.flatnonzero(ordered[1:] == ordered[:-1]) + 1
    outside = (ids < 0) | (ids >= count)
    bad = np.concatenate([np.flatnonzero(outside), row_of_item[again]])
    if not len(bad):
        return row_of_item
    row = int(bad.min())
    item = ids[row]
    if outside[row]:
        raise UserError(
            f"{path}: row {row}: item_id {item} is outside 0..{count - 1}; ids must be dense from 0"
        )
    first = row_of_item[np.searchsorted(ordered, item)]
    raise UserError(f"{path}: row {row}: item_id {item} is already in row {first}")


def _read_sids(
    path: Path, table: pa.Table, sid_column: str, codebook_sizes: tuple[int, ...] | None
) -> np.ndarray:
    """The SID of every row, int64 [rows, levels]."""
    if sid_column == ITEM_ID:
        return table[ITEM_ID].to_numpy().astype(np.int64)[:, None]
    codes, offsets = integer_lists(path, sid_column, table[sid_column])
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
    sids = codes.reshape(len(lengths), levels)
    if codebook_sizes is not None and len(codebook_sizes) != levels:
        raise UserError(
            f"{path}: {sid_column} has {levels} levels, data.codebook_sizes names "
            f"{len(codebook_sizes)}"
        )
    limits = np.full(levels, MAX_CODES) if codebook_sizes is None else np.asarray(codebook_sizes)
    bad = np.argwhere((sids < 0) | (sids >= limits))
    if len(bad):
        row, level = map(int, bad[0])
        hint = STATE_CODES if codebook_sizes is None else ""
        raise UserError(
            f"{path}: row {row}: {sid_column} level {level + 1} is {sids[row, level]}, "
            f"expected 0..{limits[level] - 1}{hint}"
        )
    return sids
