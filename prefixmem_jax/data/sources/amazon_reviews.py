"""Amazon Reviews 2014, 2018 and 2023: reviews and metadata as JSON lines, as they are offered."""

from __future__ import annotations

import ast
import gzip
import json
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from prefixmem_jax.data.sources.source import RawData, RawItems, Source, valid_text
from prefixmem_jax.errors import UserError

# What the same thing is called in 2023, and before.
USER = ("user_id", "reviewerID")
ITEM = ("parent_asin", "asin")
TIME = ("timestamp", "unixReviewTime")


@dataclass(frozen=True)
class AmazonReviews(Source):
    """Reviews (`Beauty.jsonl.gz`, `reviews_Beauty_5.json.gz`), and maybe their items' metadata
    (`meta_Beauty.jsonl.gz`), which comes first.

    Attributes:
      least_rating: reviews with fewer stars are left out.
    """

    least_rating: float = 0.0

    def read(self, paths: Sequence[Path]) -> RawData:
        if len(paths) not in (1, 2):
            raise UserError("expected METADATA REVIEWS, or REVIEWS alone")
        path = paths[-1]
        users, items, times = [], [], []
        for line, review in _objects(path):
            stars = review.get("rating", review.get("overall", 5.0))
            if not isinstance(stars, int | float):
                raise UserError(f"{path}: line {line}: rating is {stars!r}, expected a number")
            if stars < self.least_rating:
                continue
            users.append(_field(path, line, review, USER))
            items.append(_field(path, line, review, ITEM))
            time = review.get(TIME[0], review.get(TIME[1]))
            if type(time) is not int:
                raise UserError(f"{path}: line {line}: no {TIME[0]} or {TIME[1]}, or no integer")
            times.append(time)
        if not users:
            raise UserError(f"{path}: no reviews")
        catalogue = self._catalogue(paths[0], set(items)) if len(paths) == 2 else None
        return RawData(
            pa.array(users), pa.array(items), np.array(times, np.int64), catalogue, str(path)
        )

    def _catalogue(self, path: Path, wanted: set[str]) -> RawItems:
        """Titles of the items that were reviewed; a few are listed twice, and the first counts."""
        titles: dict[str, str | None] = {}
        for line, item in _objects(path):
            name = _field(path, line, item, ITEM)
            if name in wanted:
                title = item.get("title")
                titles.setdefault(
                    name, valid_text(title) if isinstance(title, str) and title else None
                )
        return RawItems(pa.array(list(titles), pa.string()), pa.array(titles.values(), pa.string()))


def _objects(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """The objects of a file's lines, and the lines' numbers; 2014's are Python, not JSON."""
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield number, _parse(path, number, line)
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path}: not readable ({error})") from None


def _parse(path: Path, number: int, line: bytes) -> dict[str, Any]:
    try:
        try:
            found = json.loads(line)
        except ValueError:
            found = ast.literal_eval(line.decode())
    except (ValueError, SyntaxError, RecursionError, MemoryError):
        found = None
    if not isinstance(found, dict):
        raise UserError(f"{path}: line {number}: not a JSON object")
    return found


def _field(path: Path, line: int, found: dict[str, Any], names: Sequence[str]) -> str:
    for name in names:
        if isinstance(found.get(name), str) and found[name]:
            return valid_text(found[name])
    raise UserError(f"{path}: line {line}: no {' or '.join(names)}")
