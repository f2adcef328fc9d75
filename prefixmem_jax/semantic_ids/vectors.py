"""Vectors of items, read piece by piece from files that need not fit in memory."""

from __future__ import annotations

import hashlib
import zipfile
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from prefixmem_jax.errors import UserError

EMBEDDING = "embedding"
# Numbers read at a time.
PIECE = 1 << 24


class Vectors:
    """One vector for each item 0..N-1, in that order.

    Attributes:
      count, width: N, and the numbers of a vector.
      name: where they are from, for messages.
    """

    def __init__(self, array: np.ndarray, row_of_item: np.ndarray | None, name: str):
        """
        Args:
          array: [rows, width], maybe a memory map; read as float32.
          row_of_item: int64 [items]; None where they are in order.
        """
        self._array, self._row_of_item, self.name = array, row_of_item, name
        self.count = len(array) if row_of_item is None else len(row_of_item)
        self.width = array.shape[1]

    def take(self, items: np.ndarray) -> np.ndarray:
        """Vectors of items, float32 [items, width]."""
        rows = items if self._row_of_item is None else self._row_of_item[items]
        found = np.asarray(self._array[rows], np.float32)
        bad = np.flatnonzero(~np.isfinite(found).all(axis=1))
        if len(bad):
            raise UserError(f"{self.name}: the vector of item {items[bad[0]]} is not finite")
        return found

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, items: int | np.ndarray) -> np.ndarray:
        """As `take`, or of one item: so that batches can be drawn from them as from an array."""
        return self.take(np.array([items]))[0] if np.ndim(items) == 0 else self.take(items)

    @cached_property
    def sha256(self) -> str:
        """Digest of all of them."""
        digest = hashlib.sha256()
        for _, vectors in self.pieces():
            digest.update(vectors.tobytes())
        return digest.hexdigest()

    def slices(self) -> Iterator[slice]:
        """All items, a piece at a time."""
        size = max(PIECE // self.width, 1)
        for first in range(0, self.count, size):
            yield slice(first, min(first + size, self.count))

    def pieces(self) -> Iterator[tuple[slice, np.ndarray]]:
        """All of them: items, and their vectors float32 [any, width]."""
        for items in self.slices():
            yield items, self.take(np.arange(items.start, items.stop))


def read_vectors(path: Path, items: int, keys: Sequence[str] | None, unpacked: Path) -> Vectors:
    """The vectors of items 0..items-1, matched by item id.

    Args:
      keys: what the items' owner calls them, if `item_id` in the file says that.
      path: a Parquet file with columns `item_id` and `embedding` (list of float); an .npz with
        arrays of these names; or an .npy of vectors, of which no more is read than is wanted, with
        the ids beside it: NAME.npy and NAME.item_id.npy.
      unpacked: where a Parquet file's vectors are written to, as they are read piece by piece.

    Raises:
      UserError: one line that names the file, the row and the cause.
    """
    if path.suffix == ".npz":
        ids, array = _checked(path, *_read_npz(path))
    elif path.suffix == ".npy":
        ids, array = _checked(path, *_map_npy(path))
    else:
        ids, array = _unpack_parquet(path, unpacked)
    if len(ids) != len(array):
        raise UserError(f"{path}: {len(ids)} item ids, but {len(array)} vectors")
    if keys is None and not np.issubdtype(ids.dtype, np.integer):
        raise UserError(f"{path}: column 'item_id' must hold integers without nulls")
    if keys is None:
        ids = np.where(ids < items, ids, -1).astype(np.int64)
    else:
        item_of_key = {key: item for item, key in enumerate(keys)}
        names = (
            x.decode(errors="replace") if isinstance(x, bytes) else str(x) for x in ids.tolist()
        )
        ids = np.array([item_of_key.get(name, -1) for name in names], np.int64)
    row_of_item = np.full(items, -1, np.int64)
    known = (ids >= 0) & (ids < items)
    row_of_item[ids[known]] = np.flatnonzero(known)
    repeated = np.flatnonzero(np.bincount(ids[known], minlength=items) > 1)
    if len(repeated):
        raise UserError(f"{path}: item {repeated[0]} has more than one vector")
    missing = np.flatnonzero(row_of_item < 0)
    if len(missing):
        raise UserError(
            f"{path}: no vector for item {missing[0] if keys is None else keys[missing[0]]} "
            f"({len(missing):,} of {items:,} items have none)"
        )
    return Vectors(array, row_of_item, str(path))


def _read_npz(path: Path) -> tuple[np.ndarray, np.ndarray]:
    try:
        with np.load(path) as arrays:
            return arrays["item_id"], arrays[EMBEDDING]
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise UserError(
            f"{path}: expected an .npz with arrays item_id and {EMBEDDING} ({error})"
        ) from None


def _map_npy(path: Path) -> tuple[np.ndarray, np.ndarray]:
    ids = path.with_suffix(".item_id.npy")
    try:
        return np.load(ids), np.load(path, mmap_mode="r")
    except (OSError, ValueError, EOFError) as error:
        raise UserError(
            f"{path}: expected vectors, and their item ids in {ids.name} beside it ({error})"
        ) from None


def _checked(path: Path, ids: np.ndarray, array: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    if ids.ndim != 1 or ids.dtype.kind not in "iuU":
        raise UserError(f"{path}: item_id must be ids [items], is {ids.dtype} {ids.shape}")
    if array.ndim != 2 or not array.shape[1] or not np.issubdtype(array.dtype, np.floating):
        raise UserError(
            f"{path}: {EMBEDDING} must be floats [items, width], is {array.dtype} {array.shape}"
        )
    return ids, array


def _unpack_parquet(path: Path, unpacked: Path) -> tuple[np.ndarray, np.ndarray]:
    try:
        file = pq.ParquetFile(path)
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{path}: not a readable Parquet file ({error})") from None
    for column in ("item_id", EMBEDDING):
        if column not in file.schema_arrow.names:
            raise UserError(f"{path}: no column {column!r}")
    ids, array, first = [], None, 0
    for batch in file.iter_batches(1 << 14, columns=["item_id", EMBEDDING]):
        kind = batch[EMBEDDING].type
        if not (_is_list(kind) and pa.types.is_floating(kind.value_type)):
            raise UserError(f"{path}: column {EMBEDDING!r} is {kind}, expected lists of floats")
        if batch["item_id"].null_count:
            raise UserError(f"{path}: column 'item_id' holds a null")
        lengths = batch[EMBEDDING].cast(pa.large_list(kind.value_type)).value_lengths()
        lengths = lengths.fill_null(0).to_numpy()
        if array is None:
            shape = (file.metadata.num_rows, int(lengths[0]))
            if not shape[1]:
                raise UserError(f"{path}: row 0: {EMBEDDING} is empty")
            array = np.lib.format.open_memmap(unpacked, "w+", np.float32, shape)
        ragged = np.flatnonzero(lengths != array.shape[1])
        if len(ragged):
            raise UserError(
                f"{path}: row {first + ragged[0]}: {EMBEDDING} has {lengths[ragged[0]]} numbers, "
                f"row 0 has {array.shape[1]}"
            )
        values = batch[EMBEDDING].flatten().to_numpy(zero_copy_only=False)
        array[first : first + len(batch)] = values.reshape(len(batch), -1)
        ids.append(batch["item_id"].to_numpy(zero_copy_only=False))
        first += len(batch)
    if array is None:
        raise UserError(f"{path}: the file has no rows")
    return np.concatenate(ids), array


def _is_list(kind: pa.DataType) -> bool:
    return (
        pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
    )
