"""Items that share a SID: kept so, told apart by one more level, or moved to free codes."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from prefixmem_jax.progress import progress_bar

# Distances of so many items to all codes at a time.
PIECE = 1 << 12
# Which codes of which prefixes are taken, at a time.
TABLE_BYTES = 1 << 26


def groups_of(sids: np.ndarray) -> np.ndarray:
    """For every SID [N, levels] the number of the distinct one that it is, int64 [N], in order."""
    number, distinct = np.zeros(len(sids), np.int64), 1
    for column in sids.T:
        size = int(column.max(initial=0)) + 1
        if distinct * size >= 1 << 62:
            number = np.unique(number, return_inverse=True)[1]
            distinct = int(number.max(initial=0)) + 1
        number, distinct = number * size + column, distinct * size
    return np.unique(number, return_inverse=True)[1]


def rank_in_group(group: np.ndarray, order: np.ndarray | None = None) -> np.ndarray:
    """How many of its group come before each, int64 [N], by `order` [N], or as they stand."""
    by = np.lexsort((np.arange(len(group)) if order is None else order, group))
    ordered = group[by]
    starts = np.flatnonzero(np.r_[True, ordered[1:] != ordered[:-1]])
    sizes = np.diff(np.r_[starts, len(group)])
    rank = np.empty(len(group), np.int64)
    rank[by] = np.arange(len(group)) - np.repeat(starts, sizes)
    return rank


def add_level(sids: np.ndarray, last: np.ndarray | None = None) -> np.ndarray:
    """SIDs [N, levels + 1], all distinct: the last code counts the items that shared a SID.

    Args:
      last: codes that items have already, int [N]; -1 where they have none, and get free ones.
    """
    group = groups_of(sids)
    if last is None or (last < 0).all():
        return np.column_stack([sids, rank_in_group(group)]).astype(np.int32)
    last, taken = last.copy(), {}
    new = np.flatnonzero(last < 0)
    for item in np.flatnonzero((last >= 0) & np.isin(group, group[new])):
        taken.setdefault(group[item], set()).add(int(last[item]))
    free = dict.fromkeys(group[new].tolist(), 0)
    for item in new:
        used, code = taken.get(group[item], ()), free[group[item]]
        while code in used:
            code += 1
        last[item], free[group[item]] = code, code + 1
    return np.column_stack([sids, last]).astype(np.int32)


def move_to_next_free(sids: np.ndarray, codes: int) -> np.ndarray:
    """As `move_to_free`, for SIDs of which no vectors are known: the nearest code is the next."""

    def steps(items: np.ndarray) -> np.ndarray:
        return ((np.arange(codes) - sids[items, -1:]) % codes).astype(np.float32)

    return move_to_free(sids, codes, steps)


def move_to_free(
    sids: np.ndarray,
    codes: int,
    last_distances: Callable[[np.ndarray], np.ndarray],
    fixed: np.ndarray | None = None,
) -> np.ndarray:
    """SIDs in which all but one item of each group took the nearest free code of the last level.

    Of a group, the item nearest to its code keeps it. Where a prefix has more items than codes,
    those left over share what they have.

    Args:
      sids: int32 [N, levels]; codes: of the last level.
      last_distances: for items int64 [n], the squared distance of what the levels before the last
        left over to every code of the last, float32 [n, codes].
      fixed: items that keep their SID in any case, bool [N].
    """
    sids = sids.copy()
    fixed = np.zeros(len(sids), bool) if fixed is None else fixed
    group = groups_of(sids)
    shared = np.bincount(group)[group] > 1
    # Only prefixes in which somebody has to move, a few at a time: each is a matter of its own.
    prefix = groups_of(sids[:, :-1])
    crowded = np.unique(prefix[shared])
    inside = np.flatnonzero(np.isin(prefix, crowded))
    inside = inside[np.argsort(prefix[inside], kind="stable")]
    at_a_time = max(1, TABLE_BYTES // codes)
    starts = np.searchsorted(prefix[inside], crowded[::at_a_time])
    with progress_bar(len(inside), "telling items apart", "item") as bar:
        for items in np.split(inside, starts[1:]):
            _move_within(sids, items, codes, last_distances, fixed)
            bar.update(len(items))
    return sids


def _move_within(
    sids: np.ndarray,
    items: np.ndarray,
    codes: int,
    last_distances: Callable[[np.ndarray], np.ndarray],
    fixed: np.ndarray,
) -> None:
    """Moves those of `items` int64 [n], all that there are of some prefixes; changes `sids`."""
    items = np.sort(items)
    row, group = groups_of(sids[items, :-1]), groups_of(sids[items])
    taken = np.zeros((int(row.max(initial=-1)) + 1, codes), bool)
    taken[row, sids[items, -1]] = True
    crowded = np.bincount(group)[group] > 1
    items, row, group = items[crowded], row[crowded], group[crowded]
    own = np.empty(len(items), np.float32)
    for part in _pieces(np.arange(len(items))):
        distances = last_distances(items[part])
        own[part] = distances[np.arange(len(part)), sids[items[part], -1]]
    own[fixed[items]] = -1
    moves = (rank_in_group(group, own) > 0) & ~fixed[items]
    moving, at = items[moves], row[moves]
    passed_over = np.zeros(len(moving), np.int64)
    while len(moving):
        there = ~taken.all(axis=1)[at]
        moving, at, passed_over = moving[there], at[there], passed_over[there]
        wanted, distance = _nearest_free(moving, taken, at, passed_over, last_distances)
        # Of those that want the same code, the nearest has it; the next takes the next best.
        places = at * codes + wanted
        passed_over = rank_in_group(places, distance) - 1
        first = passed_over < 0
        sids[moving[first], -1] = wanted[first]
        taken.reshape(-1)[places[first]] = True
        moving, at, passed_over = moving[~first], at[~first], passed_over[~first]


def _pieces(items: np.ndarray) -> list[np.ndarray]:
    return np.array_split(items, -(-len(items) // PIECE)) if len(items) else []


def _nearest_free(
    items: np.ndarray,
    taken: np.ndarray,
    row: np.ndarray,
    passed_over: np.ndarray,
    last_distances: Callable[[np.ndarray], np.ndarray],
) -> tuple[np.ndarray, np.ndarray]:
    """For each item a free code of its row of `taken`, and its distance.

    Args:
      passed_over: how many nearer ones are left to others, as far as there are more.
    """
    codes, distances = np.zeros(len(items), np.int32), np.zeros(len(items), np.float32)
    for part in _pieces(np.arange(len(items))):
        free = np.where(taken[row[part]], np.inf, last_distances(items[part]))
        number = np.minimum(passed_over[part], np.isfinite(free).sum(axis=1) - 1)
        each = np.arange(len(part))
        codes[part] = np.argsort(free, axis=1, kind="stable")[each, number]
        distances[part] = free[each, codes[part]]
    return codes, distances
