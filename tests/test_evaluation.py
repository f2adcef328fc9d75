"""Evaluating runs: resumed, sharded, and side by side."""

import dataclasses
import json
import shutil
import socket
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import forked
import jax
import numpy as np
import pytest
from conftest import QUICK, command_environment, prefixmem
from models import make_run, small_config

from prefixmem_jax.config_groups import DecoderConfig, EvaluationConfig
from prefixmem_jax.data.formats.parquet import write_dataset
from prefixmem_jax.errors import UserError
from prefixmem_jax.evaluation import evaluator
from prefixmem_jax.evaluation.comparison import evaluate_runs
from prefixmem_jax.evaluation.evaluator import evaluate_run, load_scores
from prefixmem_jax.evaluation.lists import load_lists
from prefixmem_jax.evaluation.report import plot_recall
from prefixmem_jax.recommender import parse_history
from prefixmem_jax.runs.run import Run
from prefixmem_jax.semantic_ids.catalog import Catalog
from prefixmem_jax.semantic_ids.space import SidSpace


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A folder of two runs; the second one, its data and its engine on one device."""
    folder = tmp_path_factory.mktemp("evaluation")
    for name, seed in (("first", 0), ("second", 1)):
        config = small_config(
            DecoderConfig(layers=1),
            0,
            name=name,
            seed=seed,
            evaluation=EvaluationConfig(batch_size=16),
        )
        make_run(folder / name, config)
    run = Run(folder / "second")
    data = run.data()
    return folder, run, data, run.engine(data.catalog, jax.devices()[:1])


def test_histories_are_item_ids_and_nothing_else():
    catalog = Catalog(np.arange(15)[:, None], [None] * 15, SidSpace((15,)))
    assert parse_history(" 3, 14,0", catalog) == [3, 14, 0]
    for text in ("15", "-1", "3,,4", "", "1.0", "²", "٣", "9" * 5000):
        with pytest.raises(UserError, match=r"is not an item id; expected 0\.\.14") as error:
            parse_history(text, catalog)
        assert len(str(error.value)) < 100


def test_a_killed_evaluation_goes_on_where_it_was(runs, monkeypatch):
    _, run, data, engine = runs
    whole = evaluate_run(run, data, engine=engine)
    monkeypatch.setattr(evaluator, "SHARE", 16)
    searched = []
    search = evaluator._search

    def dies(*arguments):
        if len(searched) == 2:
            raise KeyboardInterrupt
        searched.append(1)
        return search(*arguments)

    monkeypatch.setattr(evaluator, "_search", dies)
    with pytest.raises(KeyboardInterrupt):
        evaluate_run(run, data, engine=engine)
    assert len(list((run.path / "evaluation").glob("*/*.npz"))) == 2
    first, _ = sorted((run.path / "evaluation").glob("*/*.npz"))
    first.write_bytes(first.read_bytes()[:100])  # and one of them is damaged
    later = []
    monkeypatch.setattr(evaluator, "_search", lambda *a: later.append(1) or search(*a))
    resumed = evaluate_run(run, data, engine=engine)
    shares = -(-len(data.split.test) // 16)
    assert len(later) == shares - 1 > 0
    assert json.dumps(resumed, sort_keys=True) == json.dumps(whole, sort_keys=True)
    assert not list((run.path / "evaluation").glob("*/*.npz"))


def test_an_evaluation_of_another_model_does_not_go_on_with_its_users(runs, tmp_path, monkeypatch):
    _, run, data, engine = runs
    copied = Run(shutil.copytree(run.path, tmp_path / "run"))
    search, searched = evaluator._search, []
    monkeypatch.setattr(evaluator, "_search", lambda *a: searched.append(1) or search(*a))

    def killed(*arguments):
        raise KeyboardInterrupt

    for shares in (1, 1):  # the second time what the first did is there
        with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
            patched.setattr(evaluator, "title_bleu", killed)
            evaluate_run(copied, data, engine=engine)
        assert len(searched) == shares
    (copied.path / "transitions.npz").write_bytes(b"other counts")
    evaluate_run(copied, data, engine=engine)
    assert len(searched) == 2


def test_two_processes_evaluate_a_run_as_one_does(runs, tmp_path):
    """Four devices in two processes, which must agree on every number that users see."""
    _, run, data, _ = runs
    alone = evaluate_run(run, data, engine=run.engine(data.catalog, jax.devices()[:1]))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        "evaluate", run.path, "--heuristics", "--distributed", "--out", tmp_path / "two",
    ]  # fmt: skip

    def process(number: int) -> subprocess.CompletedProcess:
        environment = {
            **command_environment(),
            "XLA_FLAGS": f"--xla_force_host_platform_device_count=2 {QUICK}",
            "PREFIXMEM_COORDINATOR": f"127.0.0.1:{port}",
            "PREFIXMEM_PROCESSES": "2",
            "PREFIXMEM_PROCESS_ID": str(number),
        }
        return forked.run(forked.command, [*map(str, command)], environment, timeout=300)

    with ThreadPoolExecutor() as pool:
        first, second = pool.map(process, (0, 1))
    assert first.returncode == second.returncode == 0, (first, second)
    table = "item_recall@10/constrained"  # printed by the first process alone
    assert table in first.stdout and table not in second.stdout
    together = json.loads((run.path / "metrics.json").read_text())
    assert together.keys() == alone.keys()
    for name, value in alone.items():
        if isinstance(value, float):
            assert together[name] == pytest.approx(value, abs=1e-12), name
    assert set(json.loads((tmp_path / "two" / "results.json").read_text())) >= {"second", "optimum"}


def test_runs_side_by_side(runs):
    folder, _, data, _ = runs
    done = prefixmem(
        "evaluate", folder / "first", folder / "second", "--beam", 30, "--heuristics",
        "--out", folder / "compared",
    )  # fmt: skip
    results = json.loads((folder / "compared" / "results.json").read_text())
    assert list(results) == [
        "first", "second", "heuristic_popularity", "heuristic_successor",
        "heuristic_transition", "heuristic_item_knn", "optimum",
    ]  # fmt: skip
    for name in ("first", "second"):
        own = json.loads((folder / name / "metrics.json").read_text())
        assert own == results[name]
        assert own["beam"] == 30 and own["split"] == "test"
        assert own["catalogue_sha256"] == data.catalog.sha256
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


def test_whole_items_beside_sids_and_blends_of_both(runs, tmp_path):
    """A run over items' own ids has other codes: only what it says of items stands beside."""
    folder = runs[0]
    config = small_config(DecoderConfig(layers=1), 0, name="whole", sid_encoder=None)
    data = dataclasses.replace(config.data, sid_column="item_id")
    make_run(tmp_path / "whole", dataclasses.replace(config, data=data))
    results, paired, _ = evaluate_runs(
        [folder / "first", tmp_path / "whole"], beam=10, blends=[0.4, 1.0], out=tmp_path / "out"
    )
    assert list(results) == ["first", "whole", "blend_0.4", "blend_1"]
    whole, blended = results["whole"], results["blend_1"]
    assert not any(name.startswith(("tf_", "sid_")) for name in (*whole, *paired["whole"]))
    for name in ("item_recall@10/constrained", "item_ndcg@5/constrained"):
        assert blended[name] == pytest.approx(whole[name]) and name in paired["blend_0.4"]
    lists = [load_lists(run) for run in (folder / "first", tmp_path / "whole")]
    both = {item for one in lists for item in one.items[0].tolist()}
    assert len(both) > 10 and len(lists[0].users) == results["first"]["retrieval_users"]
    with pytest.raises(UserError, match="--blend: expected two runs, got 1"):
        evaluate_runs([folder / "first"], blends=[0.5])


def test_seen_items_are_left_out_or_kept(runs):
    folder, _, data, _ = runs
    catalog, histories = data.catalog, data.split.test.histories()
    for include in (False, True):
        results, _, _ = evaluate_runs([folder / "first"], beam=10, include_seen=include)
        assert results["first"]["exclude_seen"] is not include
        again = [
            set(catalog.items_of_group(catalog.group_of_item[item])) - set(history)
            for items, history in zip(load_lists(folder / "first").items, histories, strict=True)
            for item in set(items.tolist()) & set(history.tolist())
        ]
        # One that shares its SID with an item that was not seen may come with it.
        assert (not all(again)) if include else all(again)


def test_other_data_and_split(runs, tmp_path):
    folder, _, data, _ = runs
    write_dataset(tmp_path / "data", data.dataset)
    results, _, _ = evaluate_runs(
        [folder / "first"], data=str(tmp_path / "data"), split="validation", users=7, beam=5
    )
    assert results["first"]["retrieval_users"] == 7
    assert results["first"]["validation_users"] == len(data.split.validation)
    assert results["first"]["dataset_sha256"] != data.dataset.sha256
    # A card says on which users its numbers were made, whatever the split.
    prefixmem("export", folder / "first", "--out", tmp_path / "exported")
    card = (tmp_path / "exported" / "README.md").read_text()
    assert f"7 of {len(data.split.validation)} validation users, beam 5" in card


def test_another_catalogue_is_refused(runs, tmp_path):
    """Its SIDs would name other items: every verb that opens a run says so."""
    folder, _, data, _ = runs
    catalog = data.catalog
    sids = catalog.sids.copy()
    sids[[0, 1]] = sids[[1, 0]]  # the same SIDs, of other items
    changed = type(catalog)(sids, catalog.titles, catalog.space)
    write_dataset(tmp_path / "data", dataclasses.replace(data.dataset, catalog=changed))
    with pytest.raises(UserError, match="was trained with another catalogue"):
        evaluate_runs([folder / "first"], data=str(tmp_path / "data"))


def test_mistakes_are_named(runs, tmp_path):
    folder = runs[0]
    with pytest.raises(UserError, match="--beam: expected 1 or more, got 0"):
        evaluate_runs([folder / "first"], beam=0)
    with pytest.raises(UserError, match="--blend: expected a share of 0 to 1, got 30"):
        evaluate_runs([folder / "first", folder / "second"], blends=[0.3, 30])
    with pytest.raises(UserError, match="--transition-share: expected 0 to below 1, got 1"):
        evaluate_runs([folder / "first"], transition_share=1.0)
    with pytest.raises(UserError, match=r"--item-share: expected 0 to 1, got 1\.5"):
        evaluate_runs([folder / "first"], item_share=1.5)
    with pytest.raises(UserError, match="a run is named twice"):
        evaluate_runs([folder / "first", folder / "first"])
    with pytest.raises(UserError, match="not a run directory"):
        evaluate_runs([folder / "third"])
    broken = tmp_path / "broken"
    broken.mkdir()
    for name, text, words in (
        ("config.json", "{", "config.json: not JSON"),
        ("config.json", (folder / "first" / "config.json").read_text(), "data.json: not a run's"),
        ("data.json", "[]", "data.json: not a run's data description"),
    ):
        Path(broken / name).write_text(text)
        with pytest.raises(UserError, match=words) as error:
            evaluate_runs([broken])
        assert "\n" not in str(error.value)


def test_a_beam_narrower_than_any_cutoff_is_plotted_too(tmp_path):
    plot_recall(tmp_path / "recall.png", {"narrow": {"intervals": {}}})
    assert (tmp_path / "recall.png").stat().st_size > 1000
