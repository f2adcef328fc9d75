"""What any recommender must beat, and for synthetic data the best that any could do.

Each system here scores every item of the catalogue for a history. From the scores follow a
ranking of items (equal scores by ascending item id), one of SIDs (by their items' summed scores)
and, per level, the teacher-forced prediction: the code with the largest summed score among the
items that share the target's true prefix.
These systems only ever name catalogue items, so constrained and unconstrained are the same.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator

import numpy as np
from scipy import sparse

from prefixmem_jax.config_groups import EvaluationConfig
from prefixmem_jax.data.prepare import PreparedData, fixed_sample
from prefixmem_jax.data.similar_items import similar_items, words_of_items
from prefixmem_jax.data.splits import Examples
from prefixmem_jax.data.transitions import (
    Transitions,
    following_counts,
    return_rate,
    smoothed,
)
from prefixmem_jax.evaluation.metrics import (
    NOT_FOUND,
    Evaluated,
    Scores,
    by_transition,
    cutoffs,
    over_users,
    popularity_thirds,
    prefix_popularity,
    rank_scores,
)
from prefixmem_jax.progress import counted
from prefixmem_jax.semantic_ids.catalog import Catalog

# Scores of all items, 0 or more, after a history.
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
    items, size, at = data.split.items, len(data.catalog), data.split.followed_at()
    pairs, first, counts = np.unique(
        items[at] * size + items[at + 1], return_index=True, return_counts=True
    )
    order = np.lexsort((first, pairs // size))
    successors, counts = pairs[order] % size, counts[order]
    bounds = np.searchsorted(pairs, np.arange(size + 1) * size)
    popularity = data.item_counts / (data.item_counts.sum() + 1.0)  # below any single count

    def score(history: np.ndarray) -> np.ndarray:
        scores = popularity.copy()
        own = slice(*bounds[history[-1] : history[-1] + 2])
        earlier_first = 0.5 / np.arange(1, own.stop - own.start + 1)
        scores[successors[own]] = counts[own] + earlier_first
        return scores

    return score


# How counts are made and used; the best together on validation are taken. Ways: fade and powers.
WAYS = ((0.85, 0.8, 0.0), (1.0, 0.8, 0.0), (0.85, 0.65, 0.15))
BACKS, SMOOTHINGS = (0.0, 1.0), (10.0, 30.0)
SHRINKAGES = (0.0, 5.0, 20.0)
DECAYS = (0.5, 0.7, 0.9)
ALIKE = 32  # items that an item's counts are smoothed with
TUNING_USERS = 8000
USERS_AT_ONCE = 500  # scored at a time: where histories are long, nearly all items get a score


def tuned_transitions(data: PreparedData, exclude_seen: bool) -> Transitions:
    """Times that an item came after another + back * times that it came before it, smoothed with
    what is alike, and a decay.

    Back, fade (see `following_counts`), smoothing, powers (see `smoothed`) and decay are those with
    the best NDCG@10 on validation, with seen items left out or not.
    """
    items = len(data.catalog)
    similar = similar_items(words_of_items(data.catalog), ALIKE)

    def candidates() -> Iterator[sparse.csr_array]:
        for fade, *powers in WAYS:
            after = following_counts(data.split, items, fade)
            for back, smoothing in itertools.product(BACKS, SMOOTHINGS):
                yield smoothed(after + back * after.T, similar, smoothing, *powers)

    return Transitions(*_best(candidates(), data, exclude_seen), return_rate(data.split))


def transition_heuristic(data: PreparedData, transitions: Transitions) -> Scorer:
    """Scores items by how often they stood near the history's items in training, or near what is
    alike: the sum over the history of decay ** (items since) * near, see `tuned_transitions`; items
    without any come after, by popularity.
    """
    popularity = 1e-9 * data.item_counts / (data.item_counts.sum() + 1.0)
    return lambda history: transitions.scores(history) + popularity


def item_knn_heuristic(data: PreparedData, exclude_seen: bool) -> Scorer:
    """Scores items by cosine similarity to the history's, recent ones counting more.

    sim(i, j) = users with both / (sqrt(users with i * users with j) + shrinkage); an item scores
    the sum over the history of decay ** (items since) * sim; items without any come after, by
    popularity. Decay and shrinkage are those with the best NDCG@10 on validation, with seen items
    left out or not.
    """
    items, train = len(data.catalog), data.split.train
    user = np.repeat(np.arange(len(train)), train.lengths)
    seen = sparse.csr_array(
        (np.ones(len(user)), (user, data.split.items[train.indices()])), shape=(len(train), items)
    )
    seen.data[:] = 1.0  # an item counts once a user
    together = (seen.T @ seen).tocsr()
    together.setdiag(0)
    together.eliminate_zeros()
    users = np.asarray(seen.sum(axis=0)).reshape(-1)
    norm = np.sqrt(users[together.nonzero()[0]] * users[together.indices])

    def candidates() -> Iterator[sparse.csr_array]:
        for shrinkage in SHRINKAGES:
            similar = together.copy()
            similar.data = together.data / (norm + shrinkage)
            yield similar

    return transition_heuristic(
        data, Transitions(*_best(candidates(), data, exclude_seen), returns=0.0)
    )


def _best(
    candidates: Iterable[sparse.csr_array], data: PreparedData, exclude_seen: bool
) -> tuple[sparse.csr_array, float]:
    """The neighbours [items, items] and the decay, first of equals, with the best NDCG@10 on
    validation; targets that no item of the history is a neighbour of are not found.
    """
    everyone = data.split.validation
    tuning = everyone.take(fixed_sample(len(everyone), TUNING_USERS))
    histories, users = tuning.histories(), np.arange(len(tuning))
    lengths = [len(history) for history in histories]
    user, item = np.repeat(users, lengths), np.concatenate(histories)
    since = np.concatenate([np.arange(length)[::-1] for length in lengths])

    def of_histories(numbers: np.ndarray) -> sparse.csr_array:
        return sparse.csr_array((numbers, (user, item)), shape=(len(users), len(data.catalog)))

    left_out = of_histories(np.ones(len(item))) if exclude_seen else None

    def ndcg(near: sparse.csr_array, decay: float) -> float:
        weights, gained = of_histories(decay**since), 0.0
        for start in range(0, len(users), USERS_AT_ONCE):
            here = slice(start, start + USERS_AT_ONCE)
            scores = (weights[here] @ near).tocsr()
            if left_out is not None:
                scores = (scores - scores.multiply(left_out[here] > 0)).tocsr()
            rows, targets = np.arange(scores.shape[0]), tuning.targets[here]
            of_target = np.asarray(scores[rows, targets]).reshape(-1)
            scored = np.repeat(rows, np.diff(scores.indptr))
            better = np.bincount(scored[scores.data > of_target[scored]], minlength=len(rows))
            gained += np.sum(1 / np.log2(2 + better[(of_target > 0) & (better < 10)]))
        return gained / len(users)

    tried = ((near, decay) for near in candidates for decay in DECAYS)
    return max(tried, key=lambda one: ndcg(*one))


def optimum(data: PreparedData) -> Scorer:
    """Scores items by their exact probability under the process that made synthetic data."""
    return data.process.next_item_distribution


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
    examples: Examples,
    sample: np.ndarray,
    options: EvaluationConfig,
    progress: str = "",
) -> Evaluated:
    """The scores of `evaluator` that a system which ranks items has.

    Args:
      sample: which of the examples retrieval is evaluated on.
      options: cut-offs go up to the beam's width; whether seen items are left out.
    """
    catalog = data.catalog
    prefix_sums = _PrefixSums(catalog)
    chosen = set(sample.tolist())
    hits, ranks = [], []
    for user, target in enumerate(counted(examples.targets.tolist(), progress, "user")):
        values = score(examples.history(user))
        hits.append(prefix_sums.hits(values, target))
        if user in chosen:
            left_out = examples.history(user) if options.exclude_seen else np.zeros(0, np.int64)
            ranks.append(_ranks(values, target, catalog, left_out))
    levels = np.array(hits).T
    scores: Scores = {f"tf_accuracy/level_{n}": hit for n, hit in enumerate(levels, start=1)}
    thirds = popularity_thirds(prefix_popularity(catalog, data.item_counts, examples.targets))
    for name, values in thirds.items():
        scores[f"tf_accuracy/level_{len(levels)}/{name}"] = np.where(values, levels[-1], np.nan)
    retrieved: Scores = {"sid_hit_rate": np.ones(len(ranks))}
    sid_rank, item_rank = np.array(ranks).T
    for suffix in ("unconstrained", "constrained"):
        # Items are ranked one by one: the target shares its place with no other.
        alone = np.ones_like(sid_rank)
        retrieved |= rank_scores(sid_rank, item_rank - 1, alone, options.beam, suffix)
        for cutoff in cutoffs(options.beam):
            retrieved[f"sid_valid@{cutoff}/{suffix}"] = np.ones(len(ranks))
    retrieved |= by_transition(retrieved, data.split.followed(examples.take(sample)))
    return Evaluated(scores | over_users(retrieved, sample, len(examples)), {})


def _ranks(
    scores: np.ndarray, target: int, catalog: Catalog, left_out: np.ndarray
) -> tuple[int, int]:
    """1-based rank of the target's SID among SIDs that have an item to show, and of the target
    among the items that are shown; equal ones in ascending order.

    Args:
      scores: float [items], 0 or more.
    """
    group_of_item, sizes = catalog.group_of_item, catalog.group_sizes
    sums = np.bincount(group_of_item, scores, len(sizes))
    groups, gone = np.unique(group_of_item[np.unique(left_out)], return_counts=True)
    sums[groups[gone == sizes[groups]]] = -np.inf
    scores = scores.copy()
    scores[left_out] = -np.inf
    return _rank(sums, group_of_item[target]), _rank(scores, target)


def _rank(values: np.ndarray, one: int) -> int:
    """The place of one of the values, from 1; NOT_FOUND where it is -inf."""
    if np.isneginf(values[one]):
        return NOT_FOUND
    return 1 + int(np.sum(values > values[one]) + np.sum(values[:one] == values[one]))
