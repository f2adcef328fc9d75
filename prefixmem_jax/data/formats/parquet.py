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
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from prefixmem_jax.data.dataset import ITEM_ID, Dataset, Histories
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
    folder = to_path(folder)
    catalog = read_catalog(folder, sid_column, codebook_sizes)
    histories = _read_histories(folder / HISTORIES, len(catalog))
    digest = hashlib.sha256(sha256_of(folder / ITEMS) + sha256_of(folder / HISTORIES))
    return Dataset(absolute(folder).name, catalog, histories, digest.hexdigest())


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
    return _texts(path, table, "title").take(row_of_item).to_pylist()


def _keys(path: Path, table: pa.Table, row_of_item: np.ndarray) -> list[str] | None:
    if "key" not in table.column_names:
        return None
    keys = _texts(path, table, "key").take(row_of_item).to_pylist()
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
    if not path.is_file():
        what = "a folder" if path.is_dir() else "no such file"
        raise UserError(f"{path}: {what}; a dataset needs the files {ITEMS} and {HISTORIES}")
    try:
        with path.open("rb") as source:
            file = pq.ParquetFile(source)
            names = file.schema_arrow.names
            for column, meaning in required.items():
                if column not in names:
                    has = ", ".join(names)
                    raise UserError(
                        f"{path}: no column {column!r} ({meaning}); the file has: {has}"
                    )
            table = file.read([name for name in names if name in (*required, *optional)])
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not a readable Parquet file ({_first_line(error)})") from None
    if table.num_rows == 0:
        raise UserError(f"{path}: the file has no rows")
    return table


def _first_line(error: Exception) -> str:
    lines = str(error).splitlines()
    return lines[0] if lines else type(error).__name__


def _texts(path: Path, table: pa.Table, column: str) -> pa.ChunkedArray:
    """A column of strings, null where there is none, every one valid."""
    texts = table[column]
    if pa.types.is_dictionary(texts.type):
        texts = texts.cast(texts.type.value_type)
    if pa.types.is_null(texts.type):
        texts = texts.cast(pa.string())
    kind = texts.type
    if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
        raise UserError(f"{path}: column {column!r} is {kind}, expected strings")
    row = 0
    for chunk in texts.chunks:
        try:
            chunk.validate(full=True)
        except pa.ArrowInvalid:
            row += next(i for i, text in enumerate(chunk) if not _is_utf8(text))
            raise UserError(f"{path}: row {row}: {column} is not UTF-8 text") from None
        row += len(chunk)
    return texts


def _is_utf8(text: pa.Scalar) -> bool:
    try:
        text.as_py()
    except UnicodeDecodeError:
        return False
    return True


def _user_ids(path: Path, table: pa.Table) -> list[str]:
    """A string for every user, each once: splits and comparisons tell users apart by them."""
    column = table["user_id"]
    if not pa.types.is_integer(column.type):
        column = _texts(path, table, "user_id")
    row_of_user: dict[str, int] = {}
    for row, user in enumerate(column.to_pylist()):
        if user is None:
            raise UserError(f"{path}: row {row}: user_id is null")
        first = row_of_user.setdefault(str(user), row)
        if first != row:
            raise UserError(
                f"{path}: row {row}: user_id {shortened(str(user))} is already in row {first}; "
                "expected one row a user"
            )
    return list(row_of_user)


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


def _read_histories(path: Path, items: int) -> Histories:
    table = _read_table(
        path, {"user_id": "string", "item_ids": "list of item ids, oldest first"}, ("timestamps",)
    )
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
    return Histories(flat, offsets, _user_ids(path, table), timestamps)
