"""What any recommender must beat, and for synthetic data the best that any could do.

Each system here scores every item of the catalogue for a history. From the scores follow a
ranking (equal scores by ascending item id) and, per level, the teacher-forced prediction: the
code with the largest summed score among the items that share the target's true prefix.
These systems only ever name catalogue items, so constrained and unconstrained are the same.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Callable, Sequence

import numpy as np
from tqdm import tqdm

from prefixmem_jax.data.prepare import PreparedData
from prefixmem_jax.data.splits import Example
from prefixmem_jax.evaluation.metrics import CUTOFFS, rank_metrics
from prefixmem_jax.semantic_ids.catalog import Catalog

Scorer = Callable[[np.ndarray], np.ndarray]


def popularity_floor(data: PreparedData) -> Scorer:
    """Scores items by their number of occurrences in training."""
    counts = data.item_counts.astype(np.float64)
    return lambda history: counts


def successor_floor(data: PreparedData) -> Scorer:
    """Scores items by how often they followed the history's last item in training.

    Equal counts keep the order in which training showed them; items that never followed come
    after, by popularity.
    """
    follows: dict[int, dict[int, int]] = defaultdict(lambda: defaultdict(int))
    for items in data.split.train:
        for last, following in itertools.pairwise(items):
            follows[int(last)][int(following)] += 1
    popularity = data.item_counts / (data.item_counts.sum() + 1.0)  # below any single count

    def score(history: np.ndarray) -> np.ndarray:
        scores = popularity.copy()
        successors = follows.get(int(history[-1]))
        if successors:
            counts = np.array(list(successors.values()), np.float64)
            scores[list(successors)] = counts + 0.5 / np.arange(1, len(counts) + 1)
        return scores

    return score


def optimum(data: PreparedData) -> Scorer:
    """Scores items by their exact probability under the process that made synthetic data."""
    return data.world.next_item_distribution


class _PrefixSums:
    """Teacher-forced predictions from item scores, over a catalogue in SID order."""

    def __init__(self, catalog: Catalog):
        self.catalog = catalog
        self.order = np.lexsort(catalog.sids.T[::-1])
        self.sorted_sids = catalog.sids[self.order]

    def hits(self, scores: np.ndarray, target: int) -> np.ndarray:
        """Whether each level's best-scored code after the true prefix is the target's: [levels]."""
        sid = self.catalog.sids[target]
        ordered = scores[self.order]
        low, high = 0, len(ordered)
        out = np.zeros(len(sid))
        for level, code in enumerate(sid):
            column = self.sorted_sids[low:high, level]
            best = np.argmax(np.bincount(column, weights=ordered[low:high]))
            out[level] = best == code
            low, high = (
                low + np.searchsorted(column, code),
                low + np.searchsorted(column, code, side="right"),
            )
        return out


def evaluate_scorer(
    score: Scorer,
    catalog: Catalog,
    examples: Sequence[Example],
    retrieval_examples: Sequence[Example],
    progress: str = "",
) -> dict[str, float]:
    """The metrics of `evaluator.evaluate_model` for a system that scores items."""
    prefix_sums = _PrefixSums(catalog)
    shown = tqdm(examples, desc=progress, unit="user", disable=not progress)
    hits = sum(prefix_sums.hits(score(e.history), e.target) for e in shown) / len(examples)
    metrics = {f"tf_accuracy/level_{level}": float(hit) for level, hit in enumerate(hits, start=1)}
    metrics["sid_hit_rate"] = 1.0
    ranks = np.array([_ranks(score(e.history), e.target, catalog) for e in retrieval_examples])
    for suffix in ("unconstrained", "constrained"):
        # Items are ranked one by one: the target shares its place with no other.
        alone = np.ones(len(ranks), np.int64)
        metrics |= rank_metrics(ranks[:, 0], ranks[:, 1] - 1, alone, len(catalog), suffix)
        metrics |= {f"sid_valid@{cutoff}/{suffix}": 1.0 for cutoff in CUTOFFS}
    return metrics


def _ranks(scores: np.ndarray, target: int, catalog: Catalog) -> tuple[int, int]:
    """1-based rank of the target's SID among distinct SIDs, and of the target among items."""
    better = scores > scores[target]
    better[:target] |= scores[:target] == scores[target]
    ahead = np.flatnonzero(better)
    sid_ahead = set(catalog.group_of_item[ahead].tolist())
    group = int(catalog.group_of_item[target])
    if group in sid_ahead:  # another item brings the same SID earlier
        twins = catalog.items_of_group(group)
        twins = twins[better[twins]]
        first = twins[np.lexsort((twins, -scores[twins]))[0]]
        return _ranks(scores, int(first), catalog)[0], len(ahead) + 1
    return len(sid_ahead) + 1, len(ahead) + 1
