"""Retrieval metrics against enumeration, heuristics against the numbers published for the data."""

import itertools
from functools import partial

import numpy as np
import pytest
from conftest import real_data
from hypothesis import given, settings
from hypothesis import strategies as st

from prefixmem_jax.config_groups import DataConfig, EvaluationConfig, SyntheticConfig
from prefixmem_jax.data.prepare import prepare_data
from prefixmem_jax.data.transitions import Transitions, following_counts
from prefixmem_jax.evaluation import heuristics
from prefixmem_jax.evaluation.lists import item_lists
from prefixmem_jax.evaluation.metrics import (
    beam_scores,
    by_transition,
    catalogue_metrics,
    diversity_scores,
    expected_scores,
    groups_of,
    prefix_popularity,
    teacher_forced_scores,
)
from prefixmem_jax.evaluation.statistics import compare, intervals, means
from prefixmem_jax.semantic_ids.catalog import Catalog
from prefixmem_jax.semantic_ids.space import SidSpace


@settings(max_examples=60, deadline=None)
@given(before=st.integers(0, 8), size=st.integers(1, 5), cutoff=st.sampled_from([5, 10]))
def test_expected_item_metrics_average_over_every_order_of_the_group(before, size, cutoff):
    recalls, gains, reciprocal = [], [], []
    for order in itertools.permutations(range(size)):
        rank = before + order.index(0) + 1  # member 0 is the target
        recalls.append(rank <= cutoff)
        gains.append(1 / np.log2(rank + 1) if rank <= cutoff else 0)
        reciprocal.append(1 / rank if rank <= cutoff else 0)
    metrics = expected_scores(np.array([before]), np.array([size]), cutoff)
    assert np.isclose(metrics["recall"][0], np.mean(recalls))
    assert np.isclose(metrics["ndcg"][0], np.mean(gains))
    assert np.isclose(metrics["mrr"][0], np.mean(reciprocal))


def test_beam_metrics_by_hand():
    # Items 0 and 1 share a SID; 2, 3, 4 have their own.
    sids = np.array([[0, 0], [0, 0], [0, 1], [1, 0], [1, 1]])
    catalog = Catalog(sids, [None] * 5, SidSpace((2, 3)))
    invalid, shared = [0, 2], [0, 0]
    codes = np.array(
        [
            [invalid, shared, [0, 1], [1, 0], [1, 1]],  # target 2: SID rank 3, item rank 3
            [shared, [1, 1], invalid, [-1, -1], [-1, -1]],  # target 1: SID rank 1, item 1 or 2
            [[1, 0], [0, 1], invalid, invalid, invalid],  # target 4: not there
        ]
    )
    groups = groups_of(codes, catalog)
    assert groups[0, 0] == -1 and groups[1, 3] == -2
    scores = beam_scores(groups, np.array([2, 1, 4]), catalog, "unconstrained")
    assert scores["sid_recall@5/unconstrained"].tolist() == [1, 1, 0]
    metrics = means(scores)
    assert metrics["sid_mrr@5/unconstrained"] == pytest.approx((1 / 3 + 1) / 3)
    assert metrics["sid_recall@5/unconstrained"] == pytest.approx(2 / 3)
    assert metrics["sid_ndcg@5/unconstrained"] == pytest.approx((1 / np.log2(4) + 1) / 3)
    assert metrics["item_recall@5/unconstrained"] == pytest.approx(2 / 3)
    expected = (1 / np.log2(4) + (1 + 1 / np.log2(3)) / 2) / 3
    assert metrics["item_ndcg@5/unconstrained"] == pytest.approx(expected)
    assert metrics["sid_valid@5/unconstrained"] == pytest.approx((4 + 2 + 2) / 15)
    assert not any("@10" in name for name in metrics)  # the beam is narrower than 10


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_items_that_are_left_out_are_in_no_list(seed):
    """Against lists that are written out, in every order of the items that share a SID."""
    rng = np.random.default_rng(seed)
    catalog = Catalog(rng.integers(0, 2, (6, 2)), [None] * 6, SidSpace((2, 2)))
    groups = rng.permutation(len(catalog.group_sizes))[None]
    target, seen = int(rng.integers(6)), rng.integers(0, 6, rng.integers(0, 5))
    whole = [catalog.items_of_group(group) for group in groups[0]]
    shown = [[int(item) for item in items if item not in seen] for items in whole]
    ranks = [
        item.index(target) + 1 if target in (item := list(itertools.chain(*orders))) else None
        for orders in itertools.product(*(itertools.permutations(items) for items in shown))
    ]
    groups = np.pad(groups, ((0, 0), (0, 5 - groups.shape[1])), constant_values=-2)
    scores = beam_scores(groups, np.array([target]), catalog, "constrained", [seen])
    for name, gain in (("recall", lambda rank: 1.0), ("mrr", lambda rank: 1 / rank)):
        gains = [gain(rank) if rank is not None and rank <= 5 else 0.0 for rank in ranks]
        assert scores[f"item_{name}@5/constrained"][0] == pytest.approx(np.mean(gains))
    assert scores["sid_recall@5/constrained"][0] == 1.0

    codes = np.where(groups[..., None] < 0, -1, catalog.group_sids[np.maximum(groups, 0)])
    listed = item_lists(np.array([0]), codes, np.zeros(codes.shape[:2]), catalog, [seen])
    assert [item for item in listed.items[0].tolist() if item >= 0] == list(
        itertools.chain(*map(sorted, shown))
    )[:5]


@pytest.mark.parametrize(
    "name, popularity, successor",
    [
        ("beauty", None, (0.0485, 0.0369, 0.0624, 0.0413)),
        ("microlens", (0.0073, 0.0035), (0.0560, 0.0396, 0.0688, 0.0437)),
    ],
)
def test_heuristics_equal_the_published_ones(name, popularity, successor):
    data = prepare_data(DataConfig(path=str(real_data(name))))

    def evaluate(scorer, exclude_seen=False):
        test, options = data.split.test, EvaluationConfig(beam=10, exclude_seen=exclude_seen)
        metrics = heuristics.evaluate_scorer(
            scorer(data), data, test, np.arange(len(test)), options
        ).metrics
        names = ("item_recall@5", "item_ndcg@5", "item_recall@10", "item_ndcg@10")
        return [round(metrics[f"{name}/constrained"], 4) for name in names]

    if popularity is not None:
        assert evaluate(heuristics.popularity_heuristic)[2:] == list(popularity)
    assert evaluate(heuristics.successor_heuristic) == list(successor)
    if name == "beauty":
        after = following_counts(data.split, len(data.catalog), 1.0, farthest=1)
        decayed = Transitions((after + 0.5 * after.T).tocsr(), 0.7, 0.0)
        popularity = 1e-9 * data.item_counts
        found = evaluate(lambda _: lambda x: decayed.scores(x) + popularity, exclude_seen=True)
        assert found[2:] == [0.0745, 0.0457]
        # Tuned, with more than the next item counted and titles that are alike, it is a better one.
        tuned = heuristics.tuned_transitions(data, True)
        counts = partial(heuristics.transition_heuristic, transitions=tuned)
        found = evaluate(counts, exclude_seen=True)
        assert found[2] > 0.1 and found[3] > 0.06


@pytest.mark.parametrize("exclude_seen", [True, False])
def test_scorer_ranks_and_predictions_by_brute_force(exclude_seen):
    options = EvaluationConfig(beam=10, exclude_seen=exclude_seen)
    data = prepare_data(
        DataConfig(
            synthetic=SyntheticConfig(
                items=60, users=80, codebook_sizes=(4, 4, 3), children=(4, 3, 2)
            )
        )
    )
    catalog, examples = data.catalog, data.split.test.take(slice(40))
    for scorer in (heuristics.popularity_heuristic(data), heuristics.optimum(data)):
        metrics = heuristics.evaluate_scorer(scorer, data, examples, np.arange(40), options).metrics
        hits, ranks, sid_ranks = np.zeros(3), [], []
        for user, item in enumerate(examples.targets):
            scores = scorer(examples.history(user))
            left_out = set(examples.history(user)) if exclude_seen else set()
            order = sorted(range(60), key=lambda i: (i in left_out, -scores[i], i))
            ranks.append(order.index(item) + 1)
            target = tuple(catalog.sids[item])
            sums = {}
            for other in range(60):
                sid = tuple(catalog.sids[other])
                sums[sid] = sums.get(sid, 0.0) + scores[other]
            shown = {tuple(catalog.sids[i]) for i in range(60) if i not in left_out}
            sums = {sid: value for sid, value in sums.items() if sid in shown}
            sids = sorted(sums, key=lambda sid: (-sums[sid], sid))
            sid_ranks.append(sids.index(target) + 1 if target in sums else 60)
            for level in range(3):
                mass = np.zeros(4)
                for other in range(60):
                    if tuple(catalog.sids[other][:level]) == target[:level]:
                        mass[catalog.sids[other][level]] += scores[other]
                hits[level] += np.argmax(mass) == target[level]
        for level in range(3):
            assert metrics[f"tf_accuracy/level_{level + 1}"] == pytest.approx(hits[level] / 40)
        assert metrics["item_recall@10/constrained"] == np.mean(np.array(ranks) <= 10)
        assert metrics["sid_recall@5/constrained"] == np.mean(np.array(sid_ranks) <= 5)


def test_no_heuristic_beats_the_optimum():
    data = prepare_data(DataConfig(synthetic=SyntheticConfig(items=500, users=2000)))
    test, options = data.split.test, EvaluationConfig(beam=10, exclude_seen=False)
    best, popular, successor = (
        heuristics.evaluate_scorer(make(data), data, test, np.arange(len(test)), options).metrics
        for make in (
            heuristics.optimum,
            heuristics.popularity_heuristic,
            heuristics.successor_heuristic,
        )
    )
    slack = 2 * np.sqrt(0.25 / len(test))
    for name in ("tf_accuracy/level_1", "tf_accuracy/level_3", "item_recall@10/constrained"):
        assert best[name] > popular[name] - slack and best[name] > successor[name] - slack
    assert best["item_recall@10/constrained"] > 1.2 * popular["item_recall@10/constrained"]


def test_item_knn_by_brute_force():
    data = prepare_data(DataConfig(synthetic=SyntheticConfig(items=60, users=80)))
    score = heuristics.item_knn_heuristic(data, exclude_seen=True)
    history = data.split.test.history(3)
    scores = score(history)
    ranges = zip(data.split.train.starts, data.split.train.stops, strict=True)
    users = [set(data.split.items[start:stop].tolist()) for start, stop in ranges]
    count = np.array([sum(item in user for user in users) for item in range(60)])
    matches = []
    for decay, shrinkage in itertools.product(heuristics.DECAYS, heuristics.SHRINKAGES):
        expected = np.zeros(60)
        for since, item in enumerate(history[::-1]):
            for other in range(60):
                both = sum(item in user and other in user for user in users)
                if both and other != item:
                    cosine = both / (np.sqrt(count[item] * count[other]) + shrinkage)
                    expected[other] += decay**since * cosine
        matches.append(np.allclose(scores, expected, atol=1e-8))
    assert sum(matches) == 1


def test_teacher_forced_scores_by_hand():
    ranks = np.array([[1, 1, 1], [11, 1, 1], [2, 10, 3], [1, 1, 2], [3, 1, 1], [1, 2, 9]])
    popularity = np.array([5, 0, 7, 1, 9, 3])
    metrics = means(teacher_forced_scores(ranks, popularity))
    assert metrics["tf_accuracy/level_1"] == pytest.approx(3 / 6)
    assert metrics["tf_accuracy/level_3"] == pytest.approx(3 / 6)
    assert metrics["reachable"] == pytest.approx(5 / 6)
    assert metrics["tf_accuracy/level_3/unreachable"] == 1.0
    assert metrics["tf_accuracy/level_3/reachable"] == pytest.approx(2 / 5)
    assert metrics["tf_accuracy/level_3/rare"] == pytest.approx(1 / 2)  # users 1, 3
    assert metrics["tf_accuracy/level_3/medium"] == pytest.approx(1 / 2)  # 5, 0
    assert metrics["tf_accuracy/level_3/popular"] == pytest.approx(1 / 2)  # 2, 4


def test_prefix_popularity_by_hand():
    sids = np.array([[0, 0], [0, 1], [1, 0], [0, 1], [2, 5]])
    catalog = Catalog(sids, [None] * 5, SidSpace((3, 6)))
    popularity = prefix_popularity(catalog, np.array([1, 10, 100, 1000, 0]), np.array([3, 2, 4, 0]))
    assert popularity.tolist() == [1011, 100, 0, 1011]


def test_memorised_and_new_transitions_by_hand():
    scores = {"item_recall@10/constrained": np.array([1.0, 0.5, 0.0]), "other": np.zeros(3)}
    parts = by_transition(scores, np.array([False, True, False]))
    assert means(parts) == {
        "item_recall@10/constrained/memorised": 0.5,
        "item_recall@10/constrained/new": 0.5,
    }
    assert means(by_transition(scores, np.array([True] * 3))) == {
        "item_recall@10/constrained/memorised": 0.5
    }


def test_diversity_and_catalogue_metrics_by_hand():
    codes = np.array([[[0, 1], [0, 0], [2, 0]], [[1, 0], [-1, -1], [-1, -1]]])
    assert diversity_scores(codes)["unique_level_1"].tolist() == [2, 1]
    sids = np.array([[0, 0], [0, 1], [1, 0], [2, 0]])
    catalog = Catalog(sids, [None] * 4, SidSpace((3, 2)))
    groups, counts = groups_of(codes, catalog), np.array([1, 4, 4, 9])
    metrics = catalogue_metrics(groups, counts, catalog, cutoff=3)
    assert metrics["sid_coverage@3"] == 1.0
    assert catalogue_metrics(groups, counts, catalog) == {}  # the ranking is shorter than 10
    assert metrics["popularity@3"] == pytest.approx((0.5 + 0.125 + 0.875 + 0.5) / 4)


def test_intervals_cover_and_comparisons_find_what_is_there():
    rng = np.random.default_rng(0)
    covered = 0
    for trial in range(40):
        scores = {"hit": (rng.random(400) < 0.3).astype(float)}
        low, high = intervals(scores, seed=trial)["hit"]
        covered += low <= 0.3 <= high
        assert 0.06 < high - low < 0.12  # 2 x 1.96 x sqrt(.3 x .7 / 400) is .09
    assert 33 <= covered <= 40
    base = {"hit": (rng.random(2000) < 0.3).astype(float), "part": np.full(2000, np.nan)}
    base["part"][:50] = 1.0
    better = {"hit": base["hit"].copy(), "part": base["part"]}
    better["hit"][:60] = 1.0
    compared = compare(base, better)
    assert (
        compared["hit"]["p"] < 0.01 and 0 < compared["hit"]["low"] < compared["hit"]["difference"]
    )
    assert compared["part"]["difference"] == 0 and compared["part"]["p"] == 1
    noise = {"hit": rng.permutation(base["hit"])}
    assert compare(base, noise)["hit"]["p"] > 0.05
