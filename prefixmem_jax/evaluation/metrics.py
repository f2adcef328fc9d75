"""Retrieval metrics over the full catalogue, user by user, with shared SIDs counted honestly.

Two matches are reported. A *SID match* asks for the target's SID. An *item match* asks for the
target itself: a SID stands for its whole group of items, shown in random order, and the metric
is the expected value over that order. SIDs that name no item take a place in SID metrics and
none in item metrics; their share is reported.

Every function returns scores by metric name, [users] each, NaN where a user does not count; a
metric is their mean (`statistics.means`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from prefixmem_jax.evaluation.statistics import means
from prefixmem_jax.semantic_ids.catalog import Catalog

CUTOFFS = (5, 10, 20, 30, 50, 100)
REACHABLE_RANK = 10
NOT_FOUND = 1 << 40
SPLIT_BY_TRANSITION = ("item_recall@10/constrained", "item_ndcg@10/constrained")

Scores = dict[str, np.ndarray]


@dataclass(frozen=True)
class Evaluated:
    """A system's scores by user (in the order of the split), and what is not a mean over users.

    `lists` are an `evaluation.lists.ItemLists`, where the system has one list of items.
    """

    scores: Scores
    overall: dict[str, float]
    lists: Any = None

    @property
    def metrics(self) -> dict[str, float]:
        return means(self.scores) | self.overall


def over_users(scores: Scores, sample: np.ndarray, users: int) -> Scores:
    """Scores of a sample as scores of all users, NaN for the others."""
    spread = {name: np.full(users, np.nan) for name in scores}
    for name, values in scores.items():
        spread[name][sample] = values
    return spread


def groups_of(codes: np.ndarray, catalog: Catalog) -> np.ndarray:
    """Catalogue groups that ranked SIDs name: int64 [users, ranks].

    Args:
      codes: [users, ranks, levels], codes of -1 where there was no SID to give.

    Returns:
      Group numbers, -1 for a SID that names no item, -2 where there was no SID.
    """
    users, ranks, levels = codes.shape
    flat = codes.reshape(-1, levels)
    groups = np.where(flat[:, 0] < 0, -2, catalog.groups(flat))
    return groups.reshape(users, ranks)


def items_left(
    groups: np.ndarray, left_out: Sequence[np.ndarray] | None, catalog: Catalog
) -> np.ndarray:
    """How many items of each group a list shows: int64 [users, ranks]; 0 where there is no group.

    Args:
      groups: [users, ranks] from `groups_of`.
      left_out: of each user the items that are not shown; None where all are.
    """
    left = np.where(groups >= 0, catalog.group_sizes[np.maximum(groups, 0)], 0)
    if left_out is None:
        return left
    for row, own, items in zip(left, groups, left_out, strict=True):
        gone, counts = np.unique(catalog.group_of_item[np.unique(items)], return_counts=True)
        at = np.searchsorted(gone, own)
        held = np.append(gone, -3)[at] == own
        row[held] -= counts[at[held]]
    return left


def beam_scores(
    groups: np.ndarray,
    targets: np.ndarray,
    catalog: Catalog,
    suffix: str,
    left_out: Sequence[np.ndarray] | None = None,
) -> Scores:
    """Scores of ranked SIDs: `rank_scores`, and `sid_valid@K`, the share that name an item.

    Args:
      groups: [users, ranks] from `groups_of`, best first.
      targets: int [users], the target items.
      left_out: of each user the items that are not shown, though others of their SIDs are; a
        target among them is not found.
    """
    target_groups = catalog.group_of_item[targets][:, None]
    hit = groups == target_groups
    sid_rank = np.where(hit.any(axis=1), hit.argmax(axis=1) + 1, NOT_FOUND)
    sizes = items_left(groups, left_out, catalog)
    items_before = np.where(np.cumsum(hit, axis=1) > 0, 0, sizes).sum(axis=1)
    found = sid_rank != NOT_FOUND
    if left_out is not None:
        found &= [target not in own for target, own in zip(targets, left_out, strict=True)]
    items_before = np.where(found, items_before, NOT_FOUND)
    alike = np.maximum(items_left(target_groups, left_out, catalog)[:, 0], 1)
    scores = rank_scores(sid_rank, items_before, alike, groups.shape[1], suffix)
    for cutoff in cutoffs(groups.shape[1]):
        scores[f"sid_valid@{cutoff}/{suffix}"] = (groups[:, :cutoff] >= 0).mean(axis=1)
    return scores


def cutoffs(depth: int) -> list[int]:
    """The cut-offs K that a ranking of this depth can be evaluated at."""
    return [cutoff for cutoff in CUTOFFS if cutoff <= depth]


def rank_scores(
    sid_rank: np.ndarray,
    items_before: np.ndarray,
    group_size: np.ndarray,
    depth: int,
    suffix: str,
) -> Scores:
    """Recall, NDCG and MRR at each cut-off up to `depth`, by SID and by item.

    Args:
      sid_rank: 1-based rank of the target's SID, [users]; NOT_FOUND where it is not ranked.
      items_before: items shown before the target's group, [users]; NOT_FOUND likewise.
      group_size: items that share the target's place in random order, [users].
      suffix: `unconstrained` or `constrained`, the end of each name.

    Returns:
      `sid_recall@K/suffix`, `sid_ndcg@K`, `sid_mrr@K`, and the same with `item_`.
    """
    scores = {}
    alone = np.ones_like(sid_rank)
    for cutoff in cutoffs(depth):
        for kind, before, size in (
            ("sid", sid_rank - 1, alone),
            ("item", items_before, group_size),
        ):
            for name, score in expected_scores(before, size, cutoff).items():
                scores[f"{kind}_{name}@{cutoff}/{suffix}"] = score
    return scores


def by_transition(scores: Scores, followed: np.ndarray) -> Scores:
    """Retrieval of items at 10 apart for users whose target followed their last item in training,
    `/memorised`, and for the others, `/new`.

    Args:
      followed: bool [users], see `data.splits.Split.followed`.
    """
    parts = {}
    for name in SPLIT_BY_TRANSITION:
        if name in scores:
            parts[f"{name}/memorised"] = np.where(followed, scores[name], np.nan)
            parts[f"{name}/new"] = np.where(followed, np.nan, scores[name])
    return parts


def expected_scores(before: np.ndarray, group_size: np.ndarray, cutoff: int) -> Scores:
    """Expected Recall@K, NDCG@K and MRR@K where the target's place within its group is random.

    Args:
      before: what is shown before the target's group, [users].
      group_size: items in the target's group, [users].
    """
    ranks = np.arange(1, cutoff + 1)
    start = np.minimum(before, cutoff)
    stop = np.minimum(before + group_size, cutoff)

    def expected(gain_by_rank: np.ndarray) -> np.ndarray:
        total = np.concatenate([[0.0], np.cumsum(gain_by_rank)])
        return (total[stop] - total[start]) / group_size

    return {
        "recall": expected(np.ones(cutoff)),
        "ndcg": expected(1 / np.log2(ranks + 1.0)),
        "mrr": expected(1.0 / ranks),
    }


def teacher_forced_scores(ranks: np.ndarray, popularity: np.ndarray) -> Scores:
    """`tf_accuracy/level_l`; for the last level also by reachability and by prefix popularity.

    A target is *reachable* where its code is among the 10 likeliest at every level but the last:
    a beam of that width would have kept its prefix. Thirds of users by how often their target's
    prefix (all levels but the last) occurs in training: rare, medium, popular.

    Args:
      ranks: [users, levels] of the target's codes, from 1.
      popularity: `prefix_popularity`, [users].
    """
    levels = ranks.shape[1]
    hits = (ranks == 1).astype(np.float64)
    scores = {f"tf_accuracy/level_{level}": hits[:, level - 1] for level in range(1, levels + 1)}
    last = hits[:, -1]
    reachable = (ranks[:, :-1] <= REACHABLE_RANK).all(axis=1)
    scores["reachable"] = reachable.astype(np.float64)
    chosen_by = {"reachable": reachable, "unreachable": ~reachable}
    for name, chosen in (chosen_by | popularity_thirds(popularity)).items():
        scores[f"tf_accuracy/level_{levels}/{name}"] = np.where(chosen, last, np.nan)
    return scores


def prefix_popularity(catalog: Catalog, item_counts: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """Occurrences in training of items that share all codes but the last with each target.

    Args:
      item_counts: occurrences in training by item.
      targets: int [users], the target items.
    """
    _, prefix_of_item = np.unique(catalog.sids[:, :-1], axis=0, return_inverse=True)
    prefix_of_item = prefix_of_item.reshape(-1)
    return np.bincount(prefix_of_item, item_counts)[prefix_of_item[targets]]


def popularity_thirds(popularity: np.ndarray) -> dict[str, np.ndarray]:
    """Whether each user's target prefix is rare, medium or popular; equal ones stay together."""
    thirds = np.quantile(popularity, [1 / 3, 2 / 3])
    third = np.searchsorted(thirds, popularity, side="left")
    return {name: third == n for n, name in enumerate(("rare", "medium", "popular"))}


def diversity_scores(codes: np.ndarray) -> Scores:
    """`unique_level_1`: distinct first codes in each user's beam [users, beam, levels]."""
    first = np.sort(codes[..., 0], axis=1)
    new = np.concatenate([first[:, :1] >= 0, (np.diff(first) != 0) & (first[:, 1:] >= 0)], axis=1)
    return {"unique_level_1": new.sum(axis=1).astype(np.float64)}


def catalogue_metrics(
    groups: np.ndarray, item_counts: np.ndarray, catalog: Catalog, cutoff: int = 10
) -> dict[str, float]:
    """How much of the catalogue is recommended at all, and how popular that is.

    Args:
      groups: [users, ranks] from `groups_of`.
      item_counts: occurrences in training by item.

    Returns:
      Nothing where the ranking is shorter than K; else
      sid_coverage@K: share of the catalogue's SIDs in some user's first K.
      popularity@K: mean percentile (0 rarest, 1 most frequent) of recommended SIDs by their number
        of occurrences in training; .5 would be no bias.
    """
    if groups.shape[1] < cutoff:
        return {}
    shown = groups[:, :cutoff]
    shown = shown[shown >= 0]
    counts = np.bincount(catalog.group_of_item, item_counts, len(catalog.group_sids))
    order = np.sort(counts)
    below = np.searchsorted(order, counts, side="left")
    upto = np.searchsorted(order, counts, side="right")
    percentile = (below + upto) / (2 * len(counts))
    return {
        f"sid_coverage@{cutoff}": len(np.unique(shown)) / len(counts),
        f"popularity@{cutoff}": float(percentile[shown].mean()) if len(shown) else 0.0,
    }


def bleu(texts: list[str], references: list[str]) -> float:
    """Corpus BLEU (sacrebleu's default) of generated texts, 0 to 100."""
    import sacrebleu

    return float(sacrebleu.corpus_bleu(texts, [references]).score)
