"""Packed rows on disk: ArrayRecord files, a record a row, and an index of them.

Training draws rows from anywhere in them, and holds none but those of the next batches.
"""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import grain
import jax
import numpy as np
from array_record.python.array_record_module import ArrayRecordWriter

from prefixmem_jax.data.batch import Rows, count_rows, take_rows
from prefixmem_jax.errors import UserError
from prefixmem_jax.files import read_json_object, sha256_of, write_json

INDEX = "packed.json"
# A row is found without reading others.
_OPTIONS = "group_size:1,zstd:1"


@dataclass(frozen=True)
class _Written:
    """One file: its name, rows and digest, and the fields of a row as (shape, dtype)."""

    name: str
    rows: int
    sha256: str
    fields: list[tuple[list[int], str]]


def write_shards(
    folder: Path,
    make: Callable[[int], Iterable[Rows]],
    shards: int,
    workers: int,
    made_from: dict[str, Any],
    wrote: Callable[[], None],
) -> int:
    """Fills an empty folder, by so many processes, each of which writes file after file.

    JAX may not have started: they are forked, so that they share what `make` reads.

    Args:
      make: the rows of a file by its number, as pytrees of host arrays: one after the other is
        asked for, written and let go.
      made_from: what the rows depend on, in plain data.
      wrote: called after each file.

    Returns:
      How many rows there are.
    """
    done = []
    for file in in_processes(lambda number: _write(folder, make, number), shards, workers):
        done.append(file)
        wrote()
    index = {
        "made_from": made_from,
        "fields": [{"shape": shape, "dtype": dtype} for shape, dtype in done[0].fields],
        "files": [{"name": file.name, "rows": file.rows, "sha256": file.sha256} for file in done],
    }
    write_json(folder / INDEX, index)
    return sum(file.rows for file in done)


def in_processes(function: Callable[[int], Any], count: int, workers: int) -> Iterator[Any]:
    """What a function gives of 0, 1, ..., count - 1, by forked processes: see `write_shards`."""
    _FUNCTION[:] = [function]
    with ProcessPoolExecutor(workers, mp_context=get_context("fork")) as pool:
        yield from pool.map(_call, range(count))
    _FUNCTION.clear()


# What forked processes do: it cannot be sent to them.
_FUNCTION: list[Callable[[int], Any]] = []


def _call(number: int) -> Any:
    return _FUNCTION[0](number)


def _write(folder: Path, make: Callable[[int], Iterable[Rows]], number: int) -> _Written:
    path = folder / f"rows-{number:05d}.array_record"
    writer = ArrayRecordWriter(str(path), _OPTIONS)
    count, fields = 0, []
    for rows in make(number):
        leaves = [np.ascontiguousarray(leaf) for leaf in jax.tree.leaves(rows)]
        for row in range(count_rows(leaves)):
            writer.write(b"".join(leaf[row].tobytes() for leaf in leaves))
        count += count_rows(leaves)
        fields = [(list(leaf.shape[1:]), leaf.dtype.name) for leaf in leaves]
    writer.close()
    return _Written(path.name, count, sha256_of(path).hex(), fields)


class PackedShards:
    """Rows by their number, from the files that `write_shards` wrote."""

    def __init__(self, folder: str | Path, like: Rows, made_from: dict[str, Any]):
        """Opens an index and its files.

        Args:
          like: rows as the reader wants them, abstract or not.
          made_from: what the reader would make the rows from.

        Raises:
          UserError: there are no such files, or they were packed from something else.
        """
        folder = Path(folder)
        if not (folder / INDEX).is_file():
            raise UserError(f"{folder}: no {INDEX}; expected what `prefixmem data pack` wrote")
        index = read_json_object(folder / INDEX)
        if not {"made_from", "fields", "files"} <= index.keys():
            raise UserError(f"{folder / INDEX}: not what `prefixmem data pack` wrote")
        for key, value in made_from.items():
            packed = index["made_from"].get(key)
            if packed != value:
                raise UserError(
                    f"{folder}: packed with another {key} ({_short(packed)} there, "
                    f"{_short(value)} here); pack again"
                )
        self._structure = jax.tree.structure(like)
        self._fields = [
            (tuple(field["shape"]), np.dtype(field["dtype"])) for field in index["fields"]
        ]
        self._row_bytes = sum(int(np.prod(shape)) * dtype.itemsize for shape, dtype in self._fields)
        expected = [(leaf.shape[1:], np.dtype(leaf.dtype)) for leaf in jax.tree.leaves(like)]
        if self._fields != expected:
            raise UserError(f"{folder}: rows of another kind than this objective's; pack again")
        self._paths = paths = [folder / file["name"] for file in index["files"]]
        self._ends = list(itertools.accumulate(file["rows"] for file in index["files"]))
        for path in paths:
            if not path.is_file():
                raise UserError(f"{path}: missing; pack again")
        try:
            self._records = grain.sources.ArrayRecordDataSource([str(path) for path in paths])
            rows = len(self._records)
        except RuntimeError as error:  # a file that was cut off
            raise UserError(
                f"{folder}: a file is damaged ({_first_line(error)}); pack again"
            ) from None
        if rows != self._ends[-1]:
            raise UserError(f"{folder}: {rows} rows, {self._ends[-1]} by {INDEX}; pack again")

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> Rows:
        return take_rows(self.take([index]), 0)

    def take(self, indices: Sequence[int]) -> Rows:
        """Some rows, in this order."""
        content = b"".join(map(self._record, indices))
        rows, leaves, start = np.frombuffer(content, np.uint8).reshape(-1, self._row_bytes), [], 0
        for shape, dtype in self._fields:
            stop = start + int(np.prod(shape)) * dtype.itemsize
            field = np.ascontiguousarray(rows[:, start:stop]).view(dtype)
            leaves.append(field.reshape(-1, *shape))
            start = stop
        return jax.tree.unflatten(self._structure, leaves)

    def _record(self, index: int) -> bytes:
        try:
            record = self._records[index]
            if len(record) != self._row_bytes:  # of a file that was cut while it was open
                raise RuntimeError(f"{len(record)} bytes of {self._row_bytes}")
        except RuntimeError as error:
            path = self._paths[bisect.bisect_right(self._ends, index)]
            what = f" is damaged ({_first_line(error)})" if path.is_file() else ": missing"
            raise UserError(f"{path}{what}; pack again") from None
        return record


def index_sha256(folder: str | Path) -> str:
    """Digest of an index, which has those of its files."""
    return sha256_of(Path(folder) / INDEX).hex()


def _first_line(error: RuntimeError) -> str:
    return str(error).partition("\n")[0]


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) < 60 else f"{text[:57]}..."
