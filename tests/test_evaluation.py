"""Evaluating runs: resumed, sharded, and side by side."""

import json

import jax
import numpy as np
import pytest
from conftest import prefixmem
from test_export import make_run, small_config

from prefixmem_jax.config import DecoderConfig
from prefixmem_jax.data.formats.parquet import save_dataset
from prefixmem_jax.errors import UserError
from prefixmem_jax.evaluation import evaluator
from prefixmem_jax.evaluation.comparison import evaluate_runs
from prefixmem_jax.evaluation.evaluator import load_scores, write_metrics
from prefixmem_jax.inference.engine import Recommender, seen_groups


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("evaluation")
    for name, seed in (("first", 0), ("second", 1)):
        config = small_config(DecoderConfig(layers=1), 0, name=name, seed=seed)
        recommender = make_run(folder / name, config)
    return folder, recommender


def test_users_divided_among_devices_get_the_same(runs):
    folder, alone = runs
    together = Recommender.load(folder / "second", alone.data, jax.devices()[:4])
    histories = [example.history for example in alone.data.split.test[:22]]
    for options in ({"constrained": False}, {"constrained": True, "exclude_seen": True}):
        ours, theirs = (r.search(histories, 5, **options) for r in (together, alone))
        np.testing.assert_array_equal(ours[0], theirs[0])
        np.testing.assert_allclose(ours[1], theirs[1], rtol=1e-5, atol=1e-5)
    ours, theirs = (r.describe_items(range(9), 6) for r in (together, alone))
    np.testing.assert_array_equal(ours, theirs)
    assert ours.shape == (9, 6) and len(np.unique(ours)) > 1
    examples = alone.data.split.test[:22]
    np.testing.assert_array_equal(together.target_ranks(examples), alone.target_ranks(examples))


def test_seen_items_are_left_out(runs):
    _, recommender = runs
    catalog = recommender.data.catalog
    everything = recommender.recommend([5, 9], 400)
    seen = [everything[0].item, everything[3].item]
    kept = [r.item for r in recommender.recommend(seen, 400, exclude_seen=True)]
    assert sorted([*kept, *seen]) == list(range(len(catalog)))
    shared = np.flatnonzero(catalog.group_sizes > 1)
    if len(shared):  # a SID that a seen item shares with another stays
        items = catalog.items_of_group(shared[0])
        assert (seen_groups(catalog, [items[:1]]) == -1).all()
        assert seen_groups(catalog, [items])[0, 0] == shared[0]


def test_a_killed_evaluation_goes_on_where_it_was(runs, monkeypatch):
    folder, recommender = runs
    whole = write_metrics(folder / "second", recommender)
    monkeypatch.setattr(evaluator, "PART", 16)
    judged_parts = []
    search = evaluator._search_part

    def dies(*arguments):
        if len(judged_parts) == 2:
            raise KeyboardInterrupt
        judged_parts.append(1)
        return search(*arguments)

    monkeypatch.setattr(evaluator, "_search_part", dies)
    with pytest.raises(KeyboardInterrupt):
        write_metrics(folder / "second", recommender)
    assert len(list((folder / "second" / "evaluation").glob("*/*.npz"))) == 2
    later = []
    monkeypatch.setattr(evaluator, "_search_part", lambda *a: later.append(1) or search(*a))
    resumed = write_metrics(folder / "second", recommender)
    parts = -(-len(recommender.data.split.test) // 16)
    assert len(later) == parts - 2 > 0
    assert json.dumps(resumed, sort_keys=True) == json.dumps(whole, sort_keys=True)
    assert not list((folder / "second" / "evaluation").glob("*/*.npz"))


def test_runs_side_by_side(runs):
    folder, recommender = runs
    done = prefixmem(
        "evaluate", folder / "first", folder / "second", "--beam", 30, "--heuristics",
        "--out", folder / "compared",
    )  # fmt: skip
    results = json.loads((folder / "compared" / "results.json").read_text())
    assert list(results) == [
        "first", "second", "heuristic_popularity", "heuristic_successor", "heuristic_item_knn", "optimum",
    ]  # fmt: skip
    for name in ("first", "second"):
        own = json.loads((folder / name / "metrics.json").read_text())
        assert own == results[name]
        assert own["beam"] == 30 and own["split"] == "test"
        assert own["catalogue_sha256"] == recommender.data.catalog.trie.checksum
        scores = load_scores(folder / name)
        assert len(scores["tf_accuracy/level_1"]) == own["test_users"]
        for cutoff in (5, 10, 20, 30):
            for kind in ("sid", "item"):
                for metric in ("recall", "ndcg", "mrr"):
                    key = f"{kind}_{metric}@{cutoff}/constrained"
                    assert own[key] == pytest.approx(np.nanmean(scores[key]))
                    low, high = own["intervals"][key]
                    assert low <= own[key] <= high
        assert own["prefix_hit_rate/level_4"] == own["sid_hit_rate"]
        assert own["prefix_hit_rate/level_1"] >= own["prefix_hit_rate/level_4"]
        assert 1 <= own["unique_level_1"] <= 6
    paired = json.loads((folder / "compared" / "comparison.json").read_text())
    one = paired["systems"]["second"]["item_recall@10/constrained"]
    values = [results[n]["item_recall@10/constrained"] for n in ("first", "second")]
    assert one["difference"] == pytest.approx(values[1] - values[0])
    assert "against first" in done.stdout
    for plot in ("recall.png", "accuracy_by_level.png", "accuracy_by_part.png"):
        assert (folder / "compared" / plot).read_bytes().startswith(b"\x89PNG")


def test_other_data_and_split(runs, tmp_path):
    folder, recommender = runs
    save_dataset(tmp_path / "data", recommender.data.dataset)
    results, _, _ = evaluate_runs(
        [folder / "first"], data=str(tmp_path / "data"), split="validation", users=7, beam=5
    )
    assert results["first"]["retrieval_users"] == 7
    assert results["first"]["validation_users"] == len(recommender.data.split.validation)
    assert results["first"]["dataset_sha256"] != recommender.data.dataset.sha256


def test_mistakes_are_named(runs):
    folder, _ = runs
    with pytest.raises(UserError, match="--beam: expected 1 or more, got 0"):
        evaluate_runs([folder / "first"], beam=0)
    with pytest.raises(UserError, match="a run is named twice"):
        evaluate_runs([folder / "first", folder / "first"])
    with pytest.raises(UserError, match="not a run directory"):
        evaluate_runs([folder / "third"])
