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
from scipy import sparse
from tqdm import tqdm

from prefixmem_jax.data.prepare import PreparedData, fixed_sample
from prefixmem_jax.data.splits import Example
from prefixmem_jax.evaluation.evaluator import Evaluated, prefix_popularity, spread
from prefixmem_jax.evaluation.metrics import (
    Scores,
    cutoffs,
    popularity_thirds,
    rank_scores,
)
from prefixmem_jax.semantic_ids.catalog import Catalog

Scorer = Callable[[np.ndarray], np.ndarray]


def popularity_heuristic(data: PreparedData) -> Scorer:
    """Scores items by their number of occurrences in training."""
    counts = data.item_counts.astype(np.float64)
    return lambda history: counts


def successor_heuristic(data: PreparedData) -> Scorer:
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


KNN_GRID = tuple(itertools.product((0.5, 0.7, 0.9), (0.0, 5.0, 20.0)))
TUNING_USERS = 2000


def item_knn_heuristic(data: PreparedData) -> Scorer:
    """Scores items by cosine similarity to the history's, recent ones counting more.

    sim(i, j) = users with both / (sqrt(users with i * users with j) + shrinkage); an item scores
    the sum over the history of decay ** (items since) * sim; items without any come after, by
    popularity. Decay and shrinkage are those of `KNN_GRID` with the best Recall@10 on validation.
    """
    items, counts = len(data.catalog), data.item_counts
    rows = np.repeat(np.arange(len(data.split.train)), [len(s) for s in data.split.train])
    seen = sparse.csr_array(
        (np.ones(len(rows)), (rows, np.concatenate(data.split.train))),
        shape=(len(data.split.train), items),
    )
    seen.data[:] = 1.0  # an item counts once a user
    together = (seen.T @ seen).tocsr()
    together.setdiag(0)
    together.eliminate_zeros()
    users = np.asarray(seen.sum(axis=0)).reshape(-1)
    popularity = 1e-9 * counts / (counts.sum() + 1.0)
    row_of = np.repeat(np.arange(items), np.diff(together.indptr))
    norm = np.sqrt(users[row_of] * users[together.indices])

    def scorer(decay: float, shrinkage: float) -> Scorer:
        similar = together.copy()
        similar.data = together.data / (norm + shrinkage)

        def score(history: np.ndarray) -> np.ndarray:
            weights = decay ** np.arange(len(history) - 1, -1, -1)
            return similar[np.asarray(history)].T @ weights + popularity

        return score

    tuning = fixed_sample(data.split.validation, TUNING_USERS)

    def recall(options: tuple[float, float]) -> float:
        score = scorer(*options)
        ranked = [score(e.history) for e in tuning]
        better = [np.sum(s > s[e.target]) for s, e in zip(ranked, tuning, strict=True)]
        return float(np.mean(np.array(better) < 10))

    return scorer(*max(KNN_GRID, key=recall))


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
    data: PreparedData,
    examples: Sequence[Example],
    sample: np.ndarray,
    depth: int,
    progress: str = "",
) -> Evaluated:
    """The scores of `evaluator.judge` that a system which ranks items has.

    Args:
      sample: which of the examples retrieval is evaluated on.
      depth: of the ranking; cut-offs go up to it.
    """
    catalog = data.catalog
    prefix_sums = _PrefixSums(catalog)
    chosen = set(sample.tolist())
    hits, ranks = [], []
    shown = tqdm(examples, desc=progress, unit="user", disable=not progress)
    for user, example in enumerate(shown):
        values = score(example.history)
        hits.append(prefix_sums.hits(values, example.target))
        if user in chosen:
            ranks.append(_ranks(values, example.target, catalog))
    levels = np.array(hits).T
    scores: Scores = {f"tf_accuracy/level_{n}": hit for n, hit in enumerate(levels, start=1)}
    third = popularity_thirds(prefix_popularity(data, examples))
    for name, values in third.items():
        scores[f"tf_accuracy/level_{len(levels)}/{name}"] = np.where(values, levels[-1], np.nan)
    retrieved: Scores = {"sid_hit_rate": np.ones(len(ranks))}
    found = np.array(ranks)
    for suffix in ("unconstrained", "constrained"):
        # Items are ranked one by one: the target shares its place with no other.
        alone = np.ones(len(found), np.int64)
        retrieved |= rank_scores(found[:, 0], found[:, 1] - 1, alone, depth, suffix)
        for cutoff in cutoffs(depth):
            retrieved[f"sid_valid@{cutoff}/{suffix}"] = np.ones(len(found))
    return Evaluated(scores | spread(retrieved, sample, len(examples)), {})


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
