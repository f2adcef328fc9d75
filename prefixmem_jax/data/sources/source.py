"""What a source gives: who met what and when, and what the items are called."""

from __future__ import annotations

import abc
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.json
import pyarrow.parquet as pq

from prefixmem_jax.errors import UserError
from prefixmem_jax.kinds import Kind
from prefixmem_jax.text import shortened

JSON = (".json", ".jsonl", ".ndjson")
SEPARATORS = {".csv": ",", ".tsv": "\t", ".txt": "\t"}


@dataclass(frozen=True)
class RawItems:
    """Items by their own ids.

    Attributes:
      ids: strings, each once.
      titles: a string or null for each, or None.
      sids: lists of codes for each, or None.
    """

    ids: pa.Array
    titles: pa.Array | None = None
    sids: pa.Array | None = None


@dataclass(frozen=True)
class RawData:
    """A source's content, as it stands there.

    Attributes:
      users, items: own ids as strings, one for each interaction.
      times: int64 [interactions], any unit; None where interactions stand in their order.
      catalogue: items that are known; None if only from interactions.
      name: of where it came from, for messages.
    """

    users: pa.Array
    items: pa.Array
    times: np.ndarray | None
    catalogue: RawItems | None
    name: str


@dataclass(frozen=True)
class Source(Kind, abc.ABC):
    """Base of the sources' configs."""

    package: ClassVar[str] = "prefixmem_jax.data.sources"

    @abc.abstractmethod
    def read(self, paths: Sequence[Path]) -> RawData:
        """Reads what the command line names; UserError says which file has what wrong."""


def one_folder(paths: Sequence[Path], expected: str) -> Path:
    """The one folder that is named."""
    if len(paths) != 1 or not paths[0].is_dir():
        named = ", ".join(map(str, paths))
        raise UserError(f"{named}: expected a folder with {expected}")
    return paths[0]


def read_table(
    path: Path,
    separator: str | None = None,
    ids: Sequence[str | None] = (),
    wanted: Sequence[str | None] = (),
) -> pa.Table:
    """A table of a CSV or TSV file with a header, of JSON lines, or of Parquet.

    Args:
      path: its ending says which (.csv, .tsv, .txt, .json, .jsonl, .parquet; .gz and .bz2 too).
      separator: of another kind of text file, which has a header too and quotes nothing.
      ids: columns, where they are there, whose text is what it is: `007` is not `7`.
      wanted: columns, where they are there, that are read; none: all. (Of JSON lines all are.)
    """
    kind = _ending(path)
    if separator is None and kind not in (".parquet", *JSON, *SEPARATORS):
        raise UserError(f"{path}: expected a file that ends in .csv, .tsv, .jsonl or .parquet")
    try:
        if separator is None and kind == ".parquet":
            table = pq.read_table(path, columns=_chosen(pq.read_schema(path).names, wanted))
        elif separator is None and kind in JSON:
            with pa.input_stream(path) as stream:
                table = pa.json.read_json(stream)
        else:
            table = _read_separated(path, separator, ids, wanted)
    except (pa.ArrowException, OSError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{path}: not readable ({shortened(reason, 200)})") from None
    if table.num_rows == 0:
        raise UserError(f"{path}: the file has no rows")
    return table


def _ending(path: Path) -> str:
    suffixes = [suffix for suffix in path.suffixes if suffix not in (".gz", ".bz2")]
    return suffixes[-1] if suffixes else ""


def _chosen(names: Sequence[str], wanted: Sequence[str | None]) -> list[str]:
    return [name for name in names if not wanted or name in wanted]


def _read_separated(
    path: Path, separator: str | None, ids: Sequence[str | None], wanted: Sequence[str | None]
) -> pa.Table:
    quoted = separator is None
    separator = separator or SEPARATORS[_ending(path)]
    options = pa.csv.ParseOptions(
        delimiter=separator, quote_char='"' if quoted else False, newlines_in_values=quoted
    )
    with pa.input_stream(path) as stream, pa.csv.open_csv(stream, parse_options=options) as first:
        names = first.schema.names
    texts = pa.csv.ConvertOptions(
        column_types={name: pa.string() for name in ids if name is not None},
        include_columns=_chosen(names, wanted),
    )
    with pa.input_stream(path) as stream:
        table = pa.csv.read_csv(stream, parse_options=options, convert_options=texts)
    if quoted and separator == "\t":
        # Many programs write tabs between texts that they never quote.
        for name in table.column_names:
            if pa.types.is_string(table[name].type):
                broken = pc.fill_null(pc.match_substring(table[name], "\n"), False)
                if pc.any(broken).as_py():
                    row = int(np.flatnonzero(broken.to_numpy())[0])
                    raise UserError(
                        f"{path}: row {row}: {name} goes over several lines, since it begins with "
                        'a quotation mark; expected "" for each mark within quotation marks'
                    )
    return table


def column(path: Path, table: pa.Table, key: str, name: str | None, usual: Sequence[str]) -> str:
    """The name of a column.

    Args:
      key: of the config that names it, for messages.
      name: as the config says; None: the first of the `usual` ones that is there.
    """
    for candidate in usual if name is None else (name,):
        if candidate in table.column_names:
            return candidate
    has = table.column_names
    if _ending(path) == ".parquet" or _ending(path) in SEPARATORS:
        has = read_table(path).column_names  # those that were not wanted too
    what = f"column {name!r}" if name is not None else f"column like {usual[0]!r}"
    raise UserError(f"{path}: no {what}; the file has: {', '.join(has)}; set {key}=NAME")


def _whole(table: pa.Table, name: str) -> pa.Array:
    """A column as one array."""
    values = table[name].combine_chunks()
    return pa.concat_arrays(values.chunks) if isinstance(values, pa.ChunkedArray) else values


def ids_of(path: Path, table: pa.Table, name: str) -> pa.Array:
    """A column of ids as strings; none may be missing."""
    values = _whole(table, name)
    if pa.types.is_dictionary(values.type):
        values = values.dictionary_decode()
    kind = values.type
    if pa.types.is_floating(kind):
        try:
            values = values.cast(pa.int64())
        except pa.ArrowInvalid:
            raise UserError(f"{path}: column {name!r} has numbers that are no ids") from None
    elif not (
        pa.types.is_integer(kind) or pa.types.is_string(kind) or pa.types.is_large_string(kind)
    ):
        raise UserError(f"{path}: column {name!r} is {kind}, expected ids: text or integers")
    if values.null_count:
        row = int(np.flatnonzero(values.is_null().to_numpy(zero_copy_only=False))[0])
        raise UserError(f"{path}: row {row}: {name} is missing")
    texts = values.cast(pa.string())
    whole = pc.match_substring_regex(texts, r"^[0-9]+\.0$")
    if len(texts) and pc.all(pc.or_(whole, pc.match_substring_regex(texts, "^[0-9]+$"))).as_py():
        # Integers that a program took for fractions when it wrote them.
        texts = pc.replace_substring_regex(texts, r"\.0$", "")
    empty = np.flatnonzero(pc.equal(texts, "").to_numpy(zero_copy_only=False))
    if len(empty):
        raise UserError(f"{path}: row {int(empty[0])}: {name} is empty")
    return texts


def times_of(path: Path, table: pa.Table, name: str) -> np.ndarray:
    """A column of times as int64: numbers as they are, dates in microseconds."""
    values = _whole(table, name)
    kind = values.type
    if pa.types.is_string(kind) or pa.types.is_large_string(kind):
        try:
            values = values.cast(pa.timestamp("us"))
        except pa.ArrowInvalid as error:
            raise UserError(f"{path}: column {name!r}: {str(error).splitlines()[0]}") from None
    elif pa.types.is_timestamp(kind) or pa.types.is_date(kind):
        values = values.cast(pa.timestamp("us"), safe=False)  # not to the nanosecond
    elif not (pa.types.is_integer(kind) or pa.types.is_floating(kind)):
        raise UserError(f"{path}: column {name!r} is {kind}, expected numbers or dates")
    if values.null_count:
        row = int(np.flatnonzero(values.is_null().to_numpy(zero_copy_only=False))[0])
        raise UserError(f"{path}: row {row}: {name} is missing")
    if pa.types.is_floating(values.type):
        numbers = values.to_numpy()
        whole = np.all((numbers == np.floor(numbers)) | ~np.isfinite(numbers))
        kept = numbers if whole else numbers * 1e6
        bad = np.flatnonzero(~np.isfinite(kept) | (np.abs(kept) > 2**62))
        if len(bad):
            raise UserError(f"{path}: row {int(bad[0])}: {name} is {numbers[bad[0]]}")
        return kept.astype(np.int64)
    try:
        return values.cast(pa.int64()).to_numpy()
    except pa.ArrowInvalid as error:
        raise UserError(f"{path}: column {name!r}: {str(error).splitlines()[0]}") from None


def texts_of(path: Path, table: pa.Table, name: str) -> pa.Array:
    """A column of texts; null where there is none."""
    values = _whole(table, name)
    if pa.types.is_nested(values.type):
        raise UserError(f"{path}: column {name!r} is {values.type}, expected text")
    try:
        return values.cast(pa.string())
    except pa.ArrowInvalid:
        raise UserError(f"{path}: column {name!r} is no UTF-8 text") from None


def valid_text(text: str) -> str:
    """Without halves of characters, which JSON can have and nothing can store."""
    return text.encode("utf-8", "replace").decode()
