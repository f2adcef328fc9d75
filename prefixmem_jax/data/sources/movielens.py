"""MovieLens as it is unpacked: 1M (`ratings.dat`), 20M, 25M, 32M (`ratings.csv`)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from prefixmem_jax.data.sources.source import (
    RawData,
    RawItems,
    Source,
    ids_of,
    one_folder,
    read_table,
    texts_of,
    times_of,
)
from prefixmem_jax.errors import UserError


@dataclass(frozen=True)
class MovieLens(Source):
    """A folder with ratings and movies.

    Attributes:
      least_rating: ratings below this are left out.
    """

    least_rating: float = 0.0

    def read(self, paths: Sequence[Path]) -> RawData:
        folder = one_folder(paths, "ratings.csv and movies.csv, or ratings.dat and movies.dat")
        if (folder / "ratings.dat").exists():
            ratings = _read_dat(
                folder / "ratings.dat", ("userId", "movieId", "rating", "timestamp")
            )
            movies = _read_dat(folder / "movies.dat", ("movieId", "title", "genres"))
            path, titles_path = folder / "ratings.dat", folder / "movies.dat"
        else:
            path, titles_path = folder / "ratings.csv", folder / "movies.csv"
            ratings, movies = read_table(path), read_table(titles_path)
        for file, table, names in (
            (path, ratings, ("userId", "movieId", "rating", "timestamp")),
            (titles_path, movies, ("movieId", "title")),
        ):
            for name in names:
                if name not in table.column_names:
                    raise UserError(f"{file}: no column {name!r}, which MovieLens has")
        if self.least_rating:
            kept = ratings["rating"].cast(pa.float64()).to_numpy() >= self.least_rating
            ratings = ratings.filter(pa.array(kept))
        return RawData(
            ids_of(path, ratings, "userId"),
            ids_of(path, ratings, "movieId"),
            times_of(path, ratings, "timestamp"),
            RawItems(
                ids_of(titles_path, movies, "movieId"), texts_of(titles_path, movies, "title")
            ),
            str(path),
        )


def _read_dat(path: Path, names: Sequence[str]) -> pa.Table:
    """`1::1193::5::978300760` a line, in Latin-1."""
    try:
        lines = path.read_text(encoding="latin-1").splitlines()
    except OSError as error:
        raise UserError(f"{path}: not readable ({error.strerror})") from None
    rows = [line.split("::") for line in lines if line]
    for number, row in enumerate(rows, start=1):
        if len(row) != len(names):
            raise UserError(
                f"{path}: line {number}: {len(row)} fields, expected {len(names)} "
                f"({'::'.join(names)})"
            )
    columns = {
        name: list(values) for name, values in zip(names, zip(*rows, strict=True), strict=True)
    }
    for name in ("timestamp", "rating"):
        if name in columns:
            try:
                columns[name] = np.array(columns[name], np.int64)
            except ValueError:
                raise UserError(f"{path}: column {name!r} must hold integers") from None
    return pa.table(columns)
