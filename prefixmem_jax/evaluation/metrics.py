"""Retrieval metrics over the full catalogue, with items that share a SID counted honestly.

Two matches are reported. A *SID match* asks for the target's SID. An *item match* asks for the
target itself: a SID stands for its whole group of items, shown in random order, and the metric
is the expected value over that order. SIDs that name no item take a place in SID metrics and
none in item metrics; their share is reported.
"""

from __future__ import annotations

import numpy as np

from prefixmem_jax.semantic_ids.catalog import Catalog

CUTOFFS = (5, 10)
NOT_FOUND = 1 << 40


def groups_of(codes: np.ndarray, catalog: Catalog) -> np.ndarray:
    """Catalogue groups that ranked SIDs name: int64 [users, ranks].

    Args:
      codes: [users, ranks, levels], codes of -1 where there was no SID to give.

    Returns:
      Group numbers, -1 for a SID that names no item, -2 where there was no SID.
    """
    users, ranks, levels = codes.shape
    flat = codes.reshape(-1, levels)
    groups = np.array([catalog.group(sid) if sid[0] >= 0 else -2 for sid in flat], np.int64)
    return groups.reshape(users, ranks)


def beam_metrics(
    groups: np.ndarray, targets: np.ndarray, catalog: Catalog, suffix: str
) -> dict[str, float]:
    """Metrics of ranked SIDs: `rank_metrics`, and `sid_valid@K`, the share that name an item.

    Args:
      groups: [users, ranks] from `groups_of`, best first.
      targets: int [users], the target items.
    """
    target_groups = catalog.group_of_item[targets]
    hit = groups == target_groups[:, None]
    sid_rank = np.where(hit.any(axis=1), hit.argmax(axis=1) + 1, NOT_FOUND)
    sizes = np.where(groups >= 0, catalog.group_sizes[np.maximum(groups, 0)], 0)
    items_before = np.where(np.cumsum(hit, axis=1) > 0, 0, sizes).sum(axis=1)
    items_before = np.where(sid_rank == NOT_FOUND, NOT_FOUND, items_before)
    metrics = rank_metrics(
        sid_rank, items_before, catalog.group_sizes[target_groups], groups.shape[1], suffix
    )
    for cutoff in (k for k in CUTOFFS if k <= groups.shape[1]):
        metrics[f"sid_valid@{cutoff}/{suffix}"] = float((groups[:, :cutoff] >= 0).mean())
    return metrics


def rank_metrics(
    sid_rank: np.ndarray,
    items_before: np.ndarray,
    group_size: np.ndarray,
    depth: int,
    suffix: str,
) -> dict[str, float]:
    """Recall and NDCG at each cutoff up to `depth`, by SID and by item, means over users.

    Args:
      sid_rank: 1-based rank of the target's SID, [users]; NOT_FOUND where it is not ranked.
      items_before: items shown before the target's group, [users]; NOT_FOUND likewise.
      group_size: items that share the target's place in random order, [users].
      suffix: `unconstrained` or `constrained`, the end of each name.

    Returns:
      `sid_recall@K/suffix`, `sid_ndcg@K/suffix`, `item_recall@K/suffix`, `item_ndcg@K/suffix`.
    """
    metrics = {}
    for cutoff in (k for k in CUTOFFS if k <= depth):
        in_time = sid_rank <= cutoff
        gain = np.where(in_time, 1 / np.log2(sid_rank + 1.0), 0.0)
        recall, ndcg = expected_item_metrics(items_before, group_size, cutoff)
        metrics[f"sid_recall@{cutoff}/{suffix}"] = float(in_time.mean())
        metrics[f"sid_ndcg@{cutoff}/{suffix}"] = float(gain.mean())
        metrics[f"item_recall@{cutoff}/{suffix}"] = float(recall.mean())
        metrics[f"item_ndcg@{cutoff}/{suffix}"] = float(ndcg.mean())
    return metrics


def expected_item_metrics(
    items_before: np.ndarray, group_size: np.ndarray, cutoff: int
) -> tuple[np.ndarray, np.ndarray]:
    """Expected Recall@K and NDCG@K where the target's place within its group is random.

    Args:
      items_before: items shown before the target's group, [users].
      group_size: items in the target's group, [users].
    """
    gains = np.concatenate([[0.0], np.cumsum(1 / np.log2(np.arange(1, cutoff + 1) + 1.0))])
    start = np.minimum(items_before, cutoff)
    stop = np.minimum(items_before + group_size, cutoff)
    return (stop - start) / group_size, (gains[stop] - gains[start]) / group_size
