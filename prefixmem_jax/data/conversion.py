"""Raw data as a dataset folder: own ids counted from 0, histories in order, rare ones left out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import NonNegativeInt

from prefixmem_jax.data.formats.parquet import HISTORIES, ITEMS
from prefixmem_jax.data.sources.source import RawData, Source
from prefixmem_jax.data.sources.tables import Tables
from prefixmem_jax.errors import UserError
from prefixmem_jax.files import replacing_files
from prefixmem_jax.kinds import STRICT
from prefixmem_jax.text import shortened

# Two people rarely have so long a history in common; the share of users who may.
LONG_HISTORY = 5
MOST_COPIES = 0.01


@dataclass(frozen=True)
class ConversionConfig:
    """How raw data become a dataset.

    Attributes:
      source: what the files are.
      k_core: leave out users and items with fewer interactions, until none is left; 0: none.
    """

    __pydantic_config__ = STRICT

    source: Source = field(default_factory=Tables)
    k_core: NonNegativeInt = 0


class Converted(NamedTuple):
    """How much there is, and was."""

    users: int
    items: int
    interactions: int
    raw_interactions: int
    repeated: int
    untitled: int
    has_sids: bool

    def describe(self) -> str:
        left_out = self.raw_interactions - self.interactions
        return (
            f"{self.users:,} users, {self.items:,} items, {self.interactions:,} interactions "
            f"({left_out:,} left out, {self.repeated:,} of them the same user, item and time "
            f"again); {self.untitled:,} items have no title"
        )


def convert(config: ConversionConfig, paths: Sequence[Path], out: Path) -> Converted:
    """Reads raw data and writes a dataset folder (docs/data.md).

    Items get numbers in the order of the catalogue, then of their first interaction; column `key`
    keeps their own ids. Users keep theirs.

    Raises:
      UserError: names the file, what is wrong and where.
    """
    if not paths:
        raise UserError("no files are named")
    for path in paths:
        if not path.exists():
            raise UserError(f"{path}: no such file or folder")
    raw = config.source.read(paths)
    if not len(raw.items):
        raise UserError(f"{raw.name}: no interactions are left")
    users, user_ids = _numbers(raw.users)
    items, keys = _items(raw)
    keep = _once(users, items, raw.times)
    repeated = len(keep) - int(keep.sum())
    keep[keep] = _core(users[keep], items[keep], config.k_core)
    if not keep.any():
        raise UserError(
            f"{raw.name}: no user and item have {config.k_core} interactions each; expected a "
            "smaller k_core"
        )
    users, items = users[keep], items[keep]
    times = None if raw.times is None else raw.times[keep]
    kept_items = np.arange(len(keys))
    if config.k_core:
        kept_items, items = np.unique(items, return_inverse=True)
    kept_users, users = np.unique(users, return_inverse=True)
    by = np.argsort(users, kind="stable") if times is None else np.lexsort((times, users))
    items, times = items[by], None if times is None else times[by]
    offsets = np.concatenate([[0], np.cumsum(np.bincount(users))])
    _check_leaks(raw.name, offsets, items, times, user_ids.take(kept_users))
    titles = _aligned(raw, keys, "titles")
    columns = {"item_id": np.arange(len(kept_items)), "key": keys.take(kept_items)}
    if titles is not None:
        columns["title"] = titles.take(kept_items)
    sids = _aligned(raw, keys, "sids")
    if sids is not None:
        columns["sid"] = sids.take(kept_items)
    histories = {"user_id": user_ids.take(kept_users), "item_ids": _lists(offsets, items)}
    if times is not None:
        histories["timestamps"] = _lists(offsets, times)
    with replacing_files(out, "dataset", ITEMS) as folder:
        pq.write_table(pa.table(columns), folder / ITEMS)
        pq.write_table(pa.table(histories), folder / HISTORIES)
    untitled = len(kept_items) if titles is None else columns["title"].null_count
    return Converted(
        len(kept_users),
        len(kept_items),
        len(items),
        len(raw.items),
        repeated,
        untitled,
        sids is not None,
    )


def _numbers(texts: pa.Array) -> tuple[np.ndarray, pa.Array]:
    """Numbers in order of first appearance, int64, and what they stand for."""
    encoded = texts.dictionary_encode()
    return encoded.indices.to_numpy().astype(np.int64), encoded.dictionary


def _items(raw: RawData) -> tuple[np.ndarray, pa.Array]:
    """The item of each interaction, and all items' own ids: the catalogue's first."""
    if raw.catalogue is None:
        return _numbers(raw.items)
    ids = raw.catalogue.ids
    found, distinct = _numbers(ids)
    if len(distinct) != len(ids):
        seen = np.unique(found, return_index=True)[1]
        row = int(np.setdiff1d(np.arange(len(ids)), seen)[0])
        raise UserError(f"{raw.name}: item {shortened(ids[row].as_py())} is in the catalogue twice")
    numbers, keys = _numbers(pa.concat_arrays([ids, raw.items]))
    met = numbers[len(ids) :]
    if met.min() >= len(ids):
        one, other = (shortened(some[0].as_py()) for some in (ids, raw.items))
        raise UserError(
            f"{raw.name}: none of its items is in the catalogue, which has {one} where it has "
            f"{other}; expected the same ids"
        )
    return met, keys


def _aligned(raw: RawData, keys: pa.Array, what: str) -> pa.Array | None:
    """Titles or SIDs of all items; null where the catalogue has not the item."""
    values = None if raw.catalogue is None else getattr(raw.catalogue, what)
    if values is None:
        return None
    missing = len(keys) - len(values)
    return pa.concat_arrays([values, pa.nulls(missing, values.type)]) if missing else values


def _once(users: np.ndarray, items: np.ndarray, times: np.ndarray | None) -> np.ndarray:
    """Interactions but for those that a log has twice, which would give the answer away: bool."""
    keep = np.ones(len(users), bool)
    if times is not None:
        order = np.lexsort((items, users, times))  # stable: the first of each stays
        again = [np.diff(values[order]) == 0 for values in (times, users, items)]
        keep[order[1:][np.logical_and.reduce(again)]] = False
    return keep


def _check_leaks(
    name: str, offsets: np.ndarray, items: np.ndarray, times: np.ndarray | None, ids: pa.Array
) -> None:
    """Raises UserError where many users are there under two ids: one in training, one in the test.

    Args:
      items, times: by user, oldest first; user u's from offsets[u] on.
    """
    lengths = np.diff(offsets)
    digest = np.zeros(len(items), np.uint64)
    place = np.arange(len(items)) - np.repeat(offsets[:-1], lengths)
    for values in (items, place, np.zeros_like(items) if times is None else times):
        digest = _mixed(digest ^ values.astype(np.uint64))
    history = np.add.reduceat(digest, offsets[:-1])
    long = np.flatnonzero(lengths >= LONG_HISTORY)
    _, first, number = np.unique(history[long], return_index=True, return_inverse=True)
    copies = long[first[number] != np.arange(len(long))]
    if len(copies) > MOST_COPIES * len(long):
        original = long[first[number[np.searchsorted(long, copies[0])]]]
        one, other = (shortened(ids[int(user)].as_py()) for user in (original, copies[0]))
        raise UserError(
            f"{name}: {len(copies):,} of {len(long):,} users with {LONG_HISTORY} or more "
            f"interactions have the whole history of another one, such as {one} and {other}; "
            "expected each person once, or the test's answers are in the training"
        )


def _mixed(x: np.ndarray) -> np.ndarray:
    """Bits of uint64 numbers, well mixed (splitmix64)."""
    x = (x + np.uint64(0x9E3779B97F4A7C15)).astype(np.uint64)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _core(users: np.ndarray, items: np.ndarray, least: int) -> np.ndarray:
    """Interactions of users and items that have enough of them among those kept, bool."""
    keep = np.ones(len(users), bool)
    while least:
        of_user = np.bincount(users[keep], minlength=users.max() + 1)
        of_item = np.bincount(items[keep], minlength=items.max() + 1)
        enough = keep & (of_user[users] >= least) & (of_item[items] >= least)
        if (enough == keep).all():
            break
        keep = enough
    return keep


def _lists(offsets: np.ndarray, values: np.ndarray) -> pa.Array:
    return pa.LargeListArray.from_arrays(pa.array(offsets, pa.int64()), pa.array(values))
