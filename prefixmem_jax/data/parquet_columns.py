"""Columns of a Parquet file, checked on the way in: errors name the file, the row and the cause."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from prefixmem_jax.errors import UserError

# Read of a file at a time, of what is compressed there.
_BUFFER = 1 << 20


@contextmanager
def opened(path: Path, required: dict[str, str]) -> Iterator[pq.ParquetFile]:
    """A Parquet file to read from.

    Args:
      required: columns that it must have, and what each means.

    Raises:
      UserError: it has not, or has no rows, or what is read of it in the block is damaged.
    """
    if not path.is_file():
        what = "a folder" if path.is_dir() else "no such file"
        raise UserError(
            f"{path}: {what}; a dataset needs the files items.parquet and histories.parquet"
        )
    try:
        with path.open("rb") as source:
            file = pq.ParquetFile(source, buffer_size=_BUFFER)
            names = file.schema_arrow.names
            for column, meaning in required.items():
                if column not in names:
                    has = ", ".join(names)
                    raise UserError(
                        f"{path}: no column {column!r} ({meaning}); the file has: {has}"
                    )
            if file.metadata.num_rows == 0:
                raise UserError(f"{path}: the file has no rows")
            yield file
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{path}: not a readable Parquet file ({reason})") from None


def texts(path: Path, name: str, column: pa.ChunkedArray, first: int = 0) -> pa.ChunkedArray:
    """A column of strings, null where there is none, every one valid.

    Args:
      first: row of the file that the column starts with.
    """
    found = column
    if pa.types.is_dictionary(found.type):
        found = found.cast(found.type.value_type)
    if pa.types.is_null(found.type):
        found = found.cast(pa.string())
    kind = found.type
    if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
        raise UserError(f"{path}: column {name!r} is {kind}, expected strings")
    row = first
    for chunk in found.chunks:
        try:
            chunk.validate(full=True)
        except pa.ArrowInvalid:
            row += next(i for i, text in enumerate(chunk) if not _is_utf8(text))
            raise UserError(f"{path}: row {row}: {name} is not UTF-8 text") from None
        row += len(chunk)
    return found


def _is_utf8(text: pa.Scalar) -> bool:
    try:
        text.as_py()
    except UnicodeDecodeError:
        return False
    return True


def integer_lists(
    path: Path, name: str, column: pa.ChunkedArray, first: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """A list<int> column as flat int64 values and int64 offsets [rows + 1]; as `texts`."""
    array = column.combine_chunks()
    if isinstance(array, pa.ChunkedArray):
        array = pa.concat_arrays(array.chunks)
    kind = array.type
    if not is_list(kind) or not pa.types.is_integer(kind.value_type):
        raise UserError(f"{path}: column {name!r} is {kind}, expected a list of integers")
    if array.null_count:
        row = first + int(np.flatnonzero(array.is_null().to_numpy(zero_copy_only=False))[0])
        raise UserError(f"{path}: row {row}: {name} is null, expected a list of integers")
    array = of_any_length(array)
    values, lengths = array.flatten(), array.value_lengths().to_numpy(zero_copy_only=False)
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    if values.null_count:
        at = int(np.flatnonzero(values.is_null().to_numpy(zero_copy_only=False))[0])
        row = first + int(np.searchsorted(offsets, at, side="right")) - 1
        raise UserError(f"{path}: row {row}: {name} holds a null, expected integers")
    return values.to_numpy(zero_copy_only=False).astype(np.int64), offsets


def is_list(kind: pa.DataType) -> bool:
    """Lists of any length, short or long, or of one length."""
    of_one_length = pa.types.is_fixed_size_list(kind)
    return of_one_length or pa.types.is_list(kind) or pa.types.is_large_list(kind)


def of_any_length(lists: pa.Array) -> pa.Array:
    """Lists, of which none has a length by its type."""
    if not pa.types.is_fixed_size_list(lists.type):
        return lists
    return lists.cast(pa.list_(lists.type.value_type))
