"""Lists of recommended items by user, and the blend of two systems' lists."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from prefixmem_jax.errors import UserError
from prefixmem_jax.evaluation.metrics import (
    NOT_FOUND,
    Scores,
    cutoffs,
    expected_scores,
    groups_of,
)
from prefixmem_jax.files import reading_npz, write_npz
from prefixmem_jax.semantic_ids.catalog import Catalog

FILE = "lists.npz"


class ItemLists(NamedTuple):
    """The best items of some users, best first.

    Attributes:
      users: of the split, int64 [users].
      items: int32 [users, depth]; -1 where there was none.
      scores: float32 [users, depth], log-probability of each item; -inf where there was none.
    """

    users: np.ndarray
    items: np.ndarray
    scores: np.ndarray


def item_lists(
    users: np.ndarray,
    codes: np.ndarray,
    scores: np.ndarray,
    catalog: Catalog,
    left_out: Sequence[np.ndarray] | None = None,
) -> ItemLists:
    """Searched SIDs as items; those that share a SID share its probability, in ascending order.

    Args:
      codes: int32 [users, depth, levels]; scores: float32 [users, depth], as `Engine.search`.
      left_out: of each user the items that are not shown, though others of their SIDs are.
    """
    groups = groups_of(codes, catalog)
    items = np.full(groups.shape, -1, np.int32)
    values = np.full(groups.shape, -np.inf, np.float32)
    for row, (own, own_scores) in enumerate(zip(groups, scores, strict=True)):
        at, gone = 0, () if left_out is None else left_out[row]
        for group, score in zip(own[own >= 0].tolist(), own_scores[own >= 0], strict=True):
            members = catalog.items_of_group(group)
            members = members[~np.isin(members, gone)]
            share = score - np.log(max(len(members), 1))
            members = members[: len(own) - at]
            items[row, at : at + len(members)] = members
            values[row, at : at + len(members)] = share
            at += len(members)
            if at == len(own):
                break
    return ItemLists(users, items, values)


def save_lists(run: Path, lists: ItemLists) -> None:
    write_npz(run / FILE, lists._asdict(), compressed=True)


def load_lists(run: Path) -> ItemLists:
    """What an evaluation wrote."""
    with reading_npz(run / FILE) as saved:
        return ItemLists(*(saved[name] for name in ItemLists._fields))


def check_share(share: float) -> None:
    """Raises UserError where a blend cannot have this share."""
    if not 0 <= share <= 1:
        raise UserError(f"--blend: expected a share of 0 to 1, got {share}")


def blend(first: ItemLists, second: ItemLists, share: float) -> ItemLists:
    """Ranks by (1 - share) * p + share * q, p and q the lists' probabilities.

    Each list's probabilities are made to sum to one; what a list does not name, it gives none.
    """
    if not np.array_equal(first.users, second.users):
        raise UserError("evaluate: the runs' lists are of other users; evaluate them together")
    check_share(share)
    depth = first.items.shape[1]
    items = np.full((len(first.users), depth), -1, np.int32)
    scores = np.full(items.shape, -np.inf, np.float32)
    weighed = [(first, 1 - share), (second, share)]
    for row in range(len(items)):
        total: dict[int, float] = {}
        for lists, weight in weighed:
            named = lists.items[row] >= 0
            chances = np.exp(lists.scores[row, named] - lists.scores[row].max(initial=-np.inf))
            chances = weight * chances / max(chances.sum(), 1e-300)
            for item, chance in zip(lists.items[row, named].tolist(), chances, strict=True):
                total[item] = total.get(item, 0.0) + chance
        best = sorted(((-chance, item) for item, chance in total.items() if chance > 0))[:depth]
        items[row, : len(best)] = [item for _, item in best]
        scores[row, : len(best)] = np.log([-chance for chance, _ in best])
    return ItemLists(first.users, items, scores)


def list_scores(lists: ItemLists, targets: np.ndarray) -> Scores:
    """`item_recall@K/constrained` and the like of lists: [users] each.

    Args:
      targets: int [users], of the same users.
    """
    hit = lists.items == targets[:, None]
    before = np.where(hit.any(axis=1), hit.argmax(axis=1), NOT_FOUND)
    alone = np.ones_like(before)
    return {
        f"item_{name}@{cutoff}/constrained": values
        for cutoff in cutoffs(lists.items.shape[1])
        for name, values in expected_scores(before, alone, cutoff).items()
    }
