"""What any recommender must beat, and for synthetic data the best that any could do.

Each system here scores every item of the catalogue for a history. From the scores follow a
ranking (equal scores by ascending item id) and, per level, the teacher-forced prediction: the
code with the largest summed score among the items that share the target's true prefix.
These systems only ever name catalogue items, so constrained and unconstrained are the same.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence

import numpy as np

from prefixmem_jax.data.prepare import PreparedData
from prefixmem_jax.data.splits import Example
from prefixmem_jax.evaluation.metrics import retrieval_metrics
from prefixmem_jax.semantic_ids.catalog import Catalog

Scorer = Callable[[np.ndarray], np.ndarray]


def popularity_floor(data: PreparedData) -> Scorer:
    """Scores items by their number of occurrences in training."""
    counts = data.item_counts.astype(np.float64)
    return lambda history: counts


def successor_floor(data: PreparedData) -> Scorer:
    """Scores items by how often they followed the history's last item in training.

    Equal counts (mostly zero) are ordered by popularity.
    """
    follows: dict[int, dict[int, int]] = defaultdict(lambda: defaultdict(int))
    for items in data.split.train:
        for last, following in zip(items[:-1], items[1:], strict=True):
            follows[int(last)][int(following)] += 1
    popularity = data.item_counts / (data.item_counts.sum() + 1.0)  # below any single count

    def score(history: np.ndarray) -> np.ndarray:
        scores = popularity.copy()
        successors = follows.get(int(history[-1]))
        if successors:
            scores[list(successors)] += np.array(list(successors.values()))
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
    beam: int,
) -> dict[str, float]:
    """The metrics of `evaluator.evaluate_model` for a system that scores items."""
    prefix_sums = _PrefixSums(catalog)
    hits = np.zeros(catalog.space.levels)
    groups = np.full((len(retrieval_examples), beam), -2, np.int64)
    wanted = {example.user: row for row, example in enumerate(retrieval_examples)}
    for example in examples:
        scores = score(example.history)
        hits += prefix_sums.hits(scores, example.target)
        row = wanted.get(example.user)
        if row is not None:
            groups[row] = _ranked_groups(scores, catalog, beam)
    metrics = {
        f"tf_accuracy/level_{level}": float(hit) / len(examples)
        for level, hit in enumerate(hits, start=1)
    }
    metrics["sid_hit_rate"] = 1.0
    targets = np.array([example.target for example in retrieval_examples])
    for suffix in ("unconstrained", "constrained"):
        metrics |= retrieval_metrics(groups, targets, catalog, suffix)
    # These systems rank items, not SIDs, so an item's place needs no expectation over a group.
    return metrics


def _ranked_groups(scores: np.ndarray, catalog: Catalog, count: int) -> np.ndarray:
    """Distinct groups of the best-scored items, best first, [count], -2 where none is left."""
    top = min(len(scores), 4 * count)
    nearest = np.argpartition(-scores, top - 1)[:top]
    nearest = nearest[np.lexsort((nearest, -scores[nearest]))]
    ranked = list(dict.fromkeys(catalog.group_of_item[nearest].tolist()))[:count]
    return np.array(ranked + [-2] * (count - len(ranked)))
