"""The main job end to end, as a user runs it, on small data."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, command_environment, prefixmem, python_block, python_without_us

from prefixmem_jax.config_groups import SyntheticConfig
from prefixmem_jax.data.synthetic import make_synthetic
from prefixmem_jax.quickstart import fit_sid_encoder, quickstart_configs

SMALL = [
    "steps=15",
    "model.layers=1",
    "evaluation.validation_examples=40",
    "data.batch_size=8",
    "evaluation.users=40",
    "evaluation.every_steps=5",
]
SYNTHETIC = [*SMALL, "data.synthetic.items=900", "data.synthetic.users=700"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("quickstart") / "x"
    return out, prefixmem("quickstart", "--out", out, *SYNTHETIC)


def names(levels):
    yield from (f"tf_accuracy/level_{level}" for level in range(1, levels + 1))
    yield "sid_hit_rate"
    for suffix in ("unconstrained", "constrained"):
        for cutoff in (5, 10):
            for kind in ("sid_recall", "sid_ndcg", "item_recall", "item_ndcg"):
                yield f"{kind}@{cutoff}/{suffix}"


def test_results_hold_every_metric_of_every_system(finished):
    out, done = finished
    results = json.loads((out / "results.json").read_text())
    assert set(results) == {
        "baseline", "prefixmem", "heuristic_popularity", "heuristic_successor",
        "heuristic_transition", "heuristic_item_knn",
        "optimum",
    }  # fmt: skip
    for system, values in results.items():
        for name in names(4):
            assert 0 <= values[name] <= 1, (system, name)
        assert re.fullmatch("[0-9a-f]{64}", values["dataset_sha256"])
    for system in ("baseline", "prefixmem"):
        values = results[system]
        assert values["steps"] == 15 and values["seed"] == 0 and values["beam"] == 20
        assert values["sid_valid@10/constrained"] == 1.0
        assert values["seconds"] > 0 and values["flops"] > 0
        assert values["config"]["name"] == system
    ours, base = results["prefixmem"], results["baseline"]
    assert ours["tokens"] == base["tokens"] + ours["stage1_tokens"]
    assert ours["parameters"] > base["parameters"]
    for system in results:
        assert system in done.stdout
    paired = json.loads((out / "comparison.json").read_text())["systems"]["prefixmem"]
    found = paired["item_recall@10/constrained"]
    difference = ours["item_recall@10/constrained"] - base["item_recall@10/constrained"]
    assert abs(found["difference"] - difference) < 1e-9 and found["low"] <= found["high"]
    assert f"item_recall@10/constrained  {difference:+.4f}" in done.stdout
    assert "40 of them" in done.stdout  # the retrieval sample's size


def test_what_is_said_of_the_memory_stands():
    """Though the rest of it is made to fit the data's SIDs."""
    said = ["sid_encoder.target_levels=(1,4)", "sid_encoder.rows=64"]
    configs = quickstart_configs(Path("somewhere"), "data", said)
    assert Path(configs["baseline"].data.path) == Path("data")
    fitted = fit_sid_encoder(configs["prefixmem"], 5, said).sid_encoder
    assert (fitted.target_levels, fitted.orders, fitted.rows) == ((1, 4), 5, 64)
    assert fit_sid_encoder(configs["prefixmem"], 5).sid_encoder.target_levels == (1, 3, 4, 5)


def test_a_relative_folder_is_the_same_as_its_whole_path(tmp_path, monkeypatch):
    """From wherever the same command is called again."""
    monkeypatch.chdir(tmp_path)
    near, whole = (quickstart_configs(out, None) for out in (Path("x"), tmp_path / "x"))
    assert near == whole and near["prefixmem"].init.run == str(tmp_path / "x" / "classification")


def test_report_is_one_self_contained_page_with_plots_beside_it(finished):
    out, _ = finished
    page = (out / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 3
    assert not re.search(r'(src|href)="(?!data:)', page)
    for name in ("learning_curves.png", "accuracy_by_level.png", "retrieval.png"):
        assert (out / name).read_bytes()[:4] == b"\x89PNG"


def test_it_ends_with_a_folder_that_recommends_as_the_readme_says(finished):
    """The README's lines as written but for the path, where this package cannot be imported."""
    out, _ = finished
    script = python_block((ROOT / "README.md").read_text(), "quickstart/export")
    assert script.count("\n") <= 6
    printed = python_without_us(script.replace("quickstart/export", str(out / "export")))
    shown = prefixmem(
        "recommend", out / "prefixmem", "--history", "12,55,803", "--top", "5"
    ).stdout.splitlines()[1:]
    assert len(shown) == 5
    for theirs, ours in zip(printed.splitlines(), shown, strict=True):
        item, score, title = theirs.split(" ", 2)
        assert ours.split()[3] == item and ours.endswith(title)
        assert abs(float(score) - float(ours.split()[1])) < 1e-3


def test_evaluate_agrees_with_quickstart(finished):
    out, results = finished[0], json.loads((finished[0] / "results.json").read_text())
    done = prefixmem("evaluate", out / "prefixmem")
    metrics = json.loads((out / "prefixmem" / "metrics.json").read_text())
    for name in names(4):
        assert metrics[name] == results["prefixmem"][name]
    assert metrics["beam"] == 20 and metrics["retrieval_users"] == 40
    assert "item_recall@10/constrained" in done.stdout
    done = prefixmem("evaluate", out / "baseline", "--users", 10, "--beam", 5)
    assert "retrieval on 10 of 700 test users, beam 5" in done.stdout
    assert "@10" not in done.stdout and "ratio" not in done.stdout
    metrics = json.loads((out / "baseline" / "metrics.json").read_text())
    assert metrics["beam"] == 5 and metrics["retrieval_users"] == 10
    assert "item_recall@5/constrained" in metrics and "item_recall@10/constrained" not in metrics


def test_recommend_answers_line_after_line(finished):
    done = subprocess.run(
        [sys.executable, "-m", "prefixmem_jax.cli", "recommend", finished[0] / "prefixmem",
         "--top", "2"],
        input="3,14,15\nnonsense\n7\n", capture_output=True, text=True, env=command_environment(),
    )  # fmt: skip
    assert done.returncode == 0 and done.stdout.count("rank  log-prob") == 2
    assert "'nonsense' is not an item id" in done.stderr
    first = prefixmem(
        "recommend", finished[0] / "prefixmem", "--history", "3,14,15", "--top", "2"
    ).stdout
    assert done.stdout.startswith(first)


def test_recommend_names_items_of_the_catalogue(finished):
    done = prefixmem("recommend", finished[0] / "prefixmem", "--history", "3,14,15", "--top", 7)
    header, *lines = done.stdout.splitlines()
    assert "log-prob" in header and len(lines) == 7
    dataset, _ = make_synthetic(SyntheticConfig(items=900, users=700))
    scores, items = [], []
    for rank, line in enumerate(lines, start=1):
        found = re.fullmatch(r" *(\d+) +(-?[\d.]+) +item (\d+) +([\d-]+) +(synthetic \d+)", line)
        assert found and int(found[1]) == rank
        item = int(found[3])
        assert found[4] == "-".join(map(str, dataset.catalog.sids[item]))
        assert found[5] == dataset.catalog.titles[item]
        scores.append(float(found[2]))
        items.append(item)
    assert scores == sorted(scores, reverse=True) and len(set(items)) == 7


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["recommend", "RUN", "--history", "3,x"], "--history: 'x' is not an item id; expected 0..899"),
        (["recommend", "RUN", "--history", "900"], "'900' is not an item id"),
        (["recommend", "RUN", "--history", "1", "--top", "0"], "--top: expected 1 or more"),
        (["recommend", "/nowhere", "--history", "1"], "/nowhere: not a run directory"),
        (["evaluate", "RUN/../classification"], "a classification run has no decoder"),
        (["evaluate", "RUN", "--beam", "0"], "--beam: expected 1 or more"),
        (["quickstart", "--data", "/nowhere"], "/nowhere: not a folder with items.parquet"),
        (["quickstart", "stepz=3"], "stepz: no such key; did you mean steps?"),
        (["train", "/nowhere.py"], "/nowhere.py: no such config file"),
    ],
)  # fmt: skip
def test_mistakes_end_in_one_line(finished, refused, arguments, words):
    run = str(finished[0] / "prefixmem")
    assert words in refused(*(a.replace("RUN", run) for a in arguments))
