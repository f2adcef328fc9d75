"""Retrieval metrics against enumeration, floors against the numbers published for the data."""

import itertools

import numpy as np
import pytest
from conftest import real_data
from hypothesis import given, settings
from hypothesis import strategies as st

from prefixmem_jax.config import DataConfig, SyntheticConfig
from prefixmem_jax.data.prepare import prepare_data
from prefixmem_jax.evaluation import floors
from prefixmem_jax.evaluation.metrics import beam_metrics, expected_item_metrics, groups_of
from prefixmem_jax.semantic_ids.catalog import Catalog
from prefixmem_jax.semantic_ids.space import SidSpace


@settings(max_examples=60, deadline=None)
@given(before=st.integers(0, 8), size=st.integers(1, 5), cutoff=st.sampled_from([5, 10]))
def test_expected_item_metrics_average_over_every_order_of_the_group(before, size, cutoff):
    recalls, gains = [], []
    for order in itertools.permutations(range(size)):
        rank = before + order.index(0) + 1  # member 0 is the target
        recalls.append(rank <= cutoff)
        gains.append(1 / np.log2(rank + 1) if rank <= cutoff else 0)
    recall, ndcg = expected_item_metrics(np.array([before]), np.array([size]), cutoff)
    assert np.isclose(recall[0], np.mean(recalls)) and np.isclose(ndcg[0], np.mean(gains))


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
    found = beam_metrics(groups, np.array([2, 1, 4]), catalog, "unconstrained")
    assert found["sid_recall@5/unconstrained"] == pytest.approx(2 / 3)
    assert found["sid_ndcg@5/unconstrained"] == pytest.approx((1 / np.log2(4) + 1) / 3)
    assert found["item_recall@5/unconstrained"] == pytest.approx(2 / 3)
    expected = (1 / np.log2(4) + (1 + 1 / np.log2(3)) / 2) / 3
    assert found["item_ndcg@5/unconstrained"] == pytest.approx(expected)
    assert found["sid_valid@5/unconstrained"] == pytest.approx((4 + 2 + 2) / 15)
    assert not any("@10" in name for name in found)  # the beam is narrower than 10


@pytest.mark.parametrize(
    "name, popularity, successor",
    [
        ("beauty", (0.0114, 0.0053), (0.0485, 0.0369, 0.0624, 0.0413)),
        ("microlens", (0.0073, 0.0035), (0.0560, 0.0396, 0.0688, 0.0437)),
    ],
)
def test_floors_equal_the_published_ones(name, popularity, successor):
    data = prepare_data(DataConfig(path=str(real_data(name))))

    def evaluate(scorer):
        test = data.split.test
        found = floors.evaluate_scorer(scorer(data), data.catalog, test[:100], test)
        names = ("item_recall@5", "item_ndcg@5", "item_recall@10", "item_ndcg@10")
        return [round(found[f"{name}/constrained"], 4) for name in names]

    assert evaluate(floors.popularity_floor)[2:] == list(popularity)
    assert evaluate(floors.successor_floor) == list(successor)


def test_scorer_ranks_and_predictions_by_brute_force():
    data = prepare_data(
        DataConfig(
            synthetic=SyntheticConfig(
                items=60, users=80, codebook_sizes=(4, 4, 3), children=(4, 3, 2)
            )
        )
    )
    catalog, examples = data.catalog, data.split.test[:40]
    for scorer in (floors.popularity_floor(data), floors.optimum(data)):
        found = floors.evaluate_scorer(scorer, catalog, examples, examples)
        hits, ranks, sid_ranks = np.zeros(3), [], []
        for example in examples:
            scores = scorer(example.history)
            order = sorted(range(60), key=lambda item: (-scores[item], item))
            ranks.append(order.index(example.target) + 1)
            sids = list(dict.fromkeys(tuple(catalog.sids[item]) for item in order))
            target = tuple(catalog.sids[example.target])
            sid_ranks.append(sids.index(target) + 1)
            for level in range(3):
                mass = np.zeros(4)
                for item in range(60):
                    if tuple(catalog.sids[item][:level]) == target[:level]:
                        mass[catalog.sids[item][level]] += scores[item]
                hits[level] += np.argmax(mass) == target[level]
        for level in range(3):
            assert found[f"tf_accuracy/level_{level + 1}"] == pytest.approx(hits[level] / 40)
        assert found["item_recall@10/constrained"] == np.mean(np.array(ranks) <= 10)
        assert found["sid_recall@5/constrained"] == np.mean(np.array(sid_ranks) <= 5)


def test_no_floor_beats_the_optimum():
    data = prepare_data(DataConfig(synthetic=SyntheticConfig(items=500, users=2000)))
    test = data.split.test
    best, popular, successor = (
        floors.evaluate_scorer(make(data), data.catalog, test, test)
        for make in (floors.optimum, floors.popularity_floor, floors.successor_floor)
    )
    slack = 2 * np.sqrt(0.25 / len(test))
    for name in ("tf_accuracy/level_1", "tf_accuracy/level_3", "item_recall@10/constrained"):
        assert best[name] > popular[name] - slack and best[name] > successor[name] - slack
    assert best["item_recall@10/constrained"] > 1.2 * popular["item_recall@10/constrained"]
