"""The paper's tables as commands: every row builds, the choice of rates, resuming, the printout."""

import dataclasses
import json
import re
import shlex
import shutil
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from conftest import ROOT, prefixmem

from prefixmem_jax.cli.parser import parse
from prefixmem_jax.config_files import load_config, override, to_json
from prefixmem_jax.data.generation import ABOUT
from prefixmem_jax.data.generator import GeneratorConfig
from prefixmem_jax.data.prepare import data_vocabulary
from prefixmem_jax.errors import UserError
from prefixmem_jax.model_spec import ModelSpec
from prefixmem_jax.paper.experiment import Experiment, _is_evaluated
from prefixmem_jax.paper.plots import plot
from prefixmem_jax.paper.regime import describe_regime, judge
from prefixmem_jax.paper.report import describe, markdown, read_result
from prefixmem_jax.paper.scales import SCALES
from prefixmem_jax.paper.tables import ROWS, TABLES, config_of, count_runs
from prefixmem_jax.paper.workers import Workers
from prefixmem_jax.paper.written import write_configs
from prefixmem_jax.parallel.mesh import make_mesh
from prefixmem_jax.runs.metrics import read_metrics
from prefixmem_jax.semantic_ids.space import SidSpace
from prefixmem_jax.training_rows import training_source

RESULTS = ROOT / "configs" / "paper" / "results"

TINY = [
    "steps=4", "model.layers=1", "model.d_model=16", "model.d_ff=16", "data.batch_size=8",
    "data.sequence_length=64", "evaluation.every_steps=2", "evaluation.validation_examples=20",
    "evaluation.users=10", "evaluation.beam=10", "checkpoint.every_steps=4",
]  # fmt: skip


@pytest.mark.parametrize("scale", SCALES)
def test_every_row_is_a_config_that_goes_with_its_data(scale):
    base = load_config(SCALES[scale].config)
    space = SidSpace(SCALES[scale].data.codebook_sizes)
    assert base.data.codebook_sizes == space.codebook_sizes and base.sid_encoder is None
    folders = {row: Path("/somewhere") / row for row in ROWS}
    made = {}
    for row in ROWS:
        config = config_of(row, SCALES[scale], base, SCALES[scale].memory, 1e-3, 1, folders)
        if config.sid_encoder is not None:
            config.sid_encoder.check(space)
        assert (config.name, config.seed, config.optimizer.learning_rate) == (row, 1, 1e-3)
        assert (config.init.run is not None) == bool(ROWS[row].after)
        made[row] = to_json(dataclasses.replace(config, name=""))
    assert len(set(made.values())) == len(made)  # no two rows are the same
    assert {row for rows in TABLES.values() for row in rows} | {
        before for row in ROWS.values() for before in row.after
    } == set(ROWS)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    folder = tmp_path_factory.mktemp("paper")
    prefixmem(
        "data", "generate", "--out", folder / "data", "users=600", "personal=0",
        "codebook_sizes=(8,8,8,8,8)", "children=(4,2,2,4,4)", "mean_length=6",
    )  # fmt: skip
    overrides = [
        *TINY, f"data.path={folder / 'data'}", "data.codebook_sizes=(8,8,8,8,8)",
    ]  # fmt: skip
    return folder, overrides


@pytest.fixture
def workers(one_device_elsewhere):
    with Workers(2) as workers:
        yield workers


def main_table(experiment):
    ((_, table),) = experiment.results(["main"])
    return table


def test_a_table_trains_compares_chooses_and_goes_on(small, workers, monkeypatch):
    folder, overrides = small
    memory = dataclasses.replace(SCALES["tiny"].memory, rows=64, d_mem=16)

    def at(*rates):
        monkeypatch.setitem(
            SCALES, "tiny", dataclasses.replace(SCALES["tiny"], rates=rates, memory=memory)
        )

    at(1e-2)
    monkeypatch.setitem(TABLES, "main", ("baseline", "prefixmem_classification"))
    compared = dataclasses.replace(ROWS["prefixmem_classification"], equal_cost="baseline")
    monkeypatch.setitem(ROWS, "prefixmem_classification", compared)
    said = []
    out = folder / "out"
    found = main_table(Experiment("tiny", out, 1, workers, overrides, said.append))
    trained = [line for line in said if "learning rate" in line]
    assert len(trained) == len(set(trained)) == 3  # with stage 1
    assert [re.search(r"run (\d of \d)", line)[1] for line in trained] == [
        "1 of 3", "2 of 3", "3 of 3",
    ]  # fmt: skip
    assert re.search(r"about \d\d:\d\d left", trained[-1])  # two run at once: one is done by now
    rows = found["rows"]
    assert list(rows) == ["baseline", "prefixmem_classification"]
    assert {row["learning_rate"] for row in rows.values()} == {1e-2}
    difference = rows["prefixmem_classification"]["against_first"]["tf_accuracy/level_5"]
    values = [row["metrics"]["tf_accuracy/level_5"] for row in rows.values()]
    assert difference["difference"] == pytest.approx(values[1] - values[0])
    assert rows["prefixmem_classification"]["against_equal_cost"] == {
        "row": "baseline", "differences": rows["prefixmem_classification"]["against_first"],
    }  # fmt: skip
    # Stage 1 is part of the price.
    tokens = [row["tokens"] for row in rows.values()]
    assert tokens[1] == pytest.approx(2 * tokens[0])
    assert found["data"]["in_regime"] == (found["data"]["baseline_of_optimum"] < 0.8)
    users = len(Experiment("tiny", folder / "out", 1, workers, overrides).data.split.test)
    for level in (4, 5):
        pieces = [piece for piece in found["by_met"] if piece["level"] == level]
        assert sum(piece["users"] for piece in pieces) == users
        for row, one in rows.items():
            hits = sum(piece["users"] * piece["accuracy"][row] for piece in pieces)
            assert hits / users == pytest.approx(one["metrics"][f"tf_accuracy/level_{level}"])
    # Validation came after steps 2 and 4, and says what the run's last record says.
    for row in rows.values():
        assert [step for step, _, _ in row["curve"]] == [2, 4]
        assert row["curve"][0][1] == pytest.approx(row["curve"][1][1] / 2)
        assert 0 <= row["curve"][1][2] <= 1
    plot(folder / "main.png", found)
    assert (folder / "main.png").read_bytes().startswith(b"\x89PNG")
    said.clear()
    assert main_table(Experiment("tiny", out, 1, workers, overrides, said.append)) == found
    assert not [line for line in said if "learning rate" in line]  # nothing was trained again

    mistaken = [*overrides, "model.d_ff=24"]
    with (
        pytest.raises(UserError, match=r"holds a run with another config \(model.d_ff is 16"),
        Workers(2) as others,
    ):
        main_table(Experiment("tiny", out, 1, others, mistaken))

    main, *others = describe(found).split("\n\n")
    assert cells(main, "flat tokens", "L5") == [f"{100 * values[0]:.1f}", "37.6"]
    lines = "\n".join(others).splitlines()
    assert any("of the best possible at the deepest level" in line for line in lines)
    ratio = rows["baseline"]["flops"] / rows["prefixmem_classification"]["flops"]
    (head,) = (n for n, line in enumerate(lines) if f"of {ratio:.2f} times its flops" in line)
    assert lines[head].startswith("against flat tokens, of")
    shown = f"tf_accuracy/level_5: {100 * difference['difference']:+.1f}"
    assert lines[head + 1].startswith(f"  PrefixMem from classification, {shown}")

    at(1e-6, 1e-2)
    monkeypatch.setitem(TABLES, "main", ("baseline",))
    said.clear()
    table = main_table(Experiment("tiny", out, 2, workers, overrides, said.append))
    row = table["rows"]["baseline"]
    # The other rate, and a second seed at the better one.
    trained = [line for line in said if "learning rate" in line]
    assert [re.search(r"seed (\d)", line)[1] for line in trained] == ["0", "1"]
    assert "run 3 of 3, about 00:" in trained[-1]
    run = folder / "out" / "tiny" / "runs" / "baseline"
    last = [
        [r[name] for r in read_metrics(run / f"learning_rate=0.01,seed={seed}") if name in r][-1]
        for name in ["validation/accuracy/level_5"]
        for seed in (0, 1)
    ]
    assert row["curve"][-1][2] == pytest.approx(np.mean(last))
    tried = row["validation_loss"]
    assert tried["1e-06"] > tried["0.01"] and row["learning_rate"] == 1e-2
    assert len(row["by_seed"]) == 2 and row["by_seed"][0] != row["by_seed"][1]
    for name in ("tf_accuracy/level_5", "sid_recall@10/unconstrained"):
        mean = np.mean([seed[name] for seed in row["by_seed"]])
        assert row["metrics"][name] == pytest.approx(mean)


def test_counting_by_hand(small, workers):
    folder, overrides = small
    experiment = Experiment("tiny", folder / "count", 1, workers, overrides)
    levels, split = experiment.regime()["levels"], experiment.data.split
    sids = experiment.data.catalog.sids
    trained = [tuple(sids[item]) for item in split.items[split.train.indices()]]
    held_out = [tuple(sids[item]) for item in split.test.targets]
    config = experiment.base
    rows = len(training_source(config, experiment.data))
    turns = config.steps * config.data.batch_size / rows
    assert experiment.turns == turns and experiment.regime()["turns"] == turns
    for level in range(2, 6):
        assert levels[level - 1]["prefixes"] == len({tuple(sid[: level - 1]) for sid in sids})
        met = []
        for sid in held_out:
            after = [one[level - 1] for one in trained if one[: level - 1] == sid[: level - 1]]
            counts = np.array([after.count(code) for code in set(after)])
            likely = np.exp(-sum(counts / len(after) * np.log(counts / len(after))))
            met.append(turns * len(after) / likely)
        assert levels[level - 1]["met"] == pytest.approx(np.median(met))
        often = np.mean([3 <= times < 20 for times in met])
        assert levels[level - 1]["met_often_enough"] == pytest.approx(often)


def test_a_baseline_is_judged_by_the_optimum_or_else_by_what_counting_reaches():
    levels = [
        {"counting_accuracy": 0.1},
        {"counting_accuracy": 0.5, "prefixes": 9, "met": 20.0, "met_often_enough": 0.6},
    ]
    unknown = {"items": 50, "turns": 1.0, "levels": levels, "optimum": None}
    assert judge(unknown, 0.3) == {"baseline_of_counting": 0.6, "in_regime": True}
    solved = judge(unknown, 0.45)
    assert not solved["in_regime"]
    assert "OUT of the regime" in describe_regime(unknown | solved)[-1]
    assert "90% of what counting reaches" in describe_regime(unknown | solved)[-1]
    known = unknown | {"optimum": [0.2, 0.6]}
    assert judge(known, 0.45)["in_regime"] and judge(known, 0.45)["baseline_of_counting"] == 0.9
    assert "75% of the best possible" in describe_regime(known | judge(known, 0.45))[-1]
    # Before anything is trained.
    assert "stays below 0.400, 80% of what counting" in describe_regime(unknown)[-1]
    assert "stays below 0.480, 80% of the best" in describe_regime(known)[-1]
    levels[1]["met_often_enough"] = 0.1
    assert describe_regime(unknown)[-1].startswith("OUT of the regime: at the deepest level 10%")


def test_the_regime_of_any_data_is_told_before_training(small, workers, tmp_path, refused):
    folder, _ = small
    for name in ("items.parquet", "histories.parquet"):
        shutil.copy(folder / "data" / name, tmp_path)  # and not what is known of its optimum
    data = [f"data.path={tmp_path}", "data.codebook_sizes=none"]
    done = prefixmem("paper", "regime", "--out", tmp_path / "out", *data)
    lines = done.stdout.splitlines()
    regime = Experiment("tiny", folder / "count", 1, workers, data).regime()
    assert len(lines) == 6 and lines[-1].startswith("OUT of the regime: ")
    assert f"{regime['levels'][-1]['prefixes']:,} prefixes" in lines[-2]
    assert f"{regime['turns']:.1f} turns" in lines[0]
    assert not (tmp_path / "out").exists()
    for wrong, said in [
        ([f"data.path={tmp_path / 'no'}"], "no: not a folder with items.parquet"),
        ([f"data.path={tmp_path}", "data.codebook_sizes=(8,8)"], "sid has 5 levels"),
        ([*data, "data.holdout=1e-9"], "data.split=users leaves validation empty"),
    ]:
        assert said in refused("paper", "regime", *wrong)


def test_rows_of_the_sweep_differ_from_prefixmem_in_one_key_and_take_its_rate(
    small, workers, monkeypatch
):
    base, memory = load_config(SCALES["tiny"].config), SCALES["tiny"].memory

    def keys(row):
        made = dataclasses.replace(
            config_of(row, SCALES["tiny"], base, memory, 1e-3, 1, {}), name=""
        )
        return dict(leaves(json.loads(to_json(made)), ""))

    def leaves(value, name):
        if not isinstance(value, dict):
            yield name, json.dumps(value)
            return
        for key, inner in value.items():
            yield from leaves(inner, f"{name}.{key}")

    changed = {}
    for row in (*TABLES["sweep"][2:], "prefixmem_three_levels"):
        ours, theirs = keys(row), keys("prefixmem")
        (key,) = (key for key in ours if ours[key] != theirs[key])
        changed.setdefault(key.rpartition(".")[2], set()).add(ours[key])
    assert changed == {
        "orders": {"1", "2", "3"}, "heads": {"1", "8"}, "rate": {"1.0", "20.0"},
        "target_levels": {"[3, 4, 5]"},
    }  # fmt: skip

    folder, overrides = small
    experiment = Experiment("tiny", folder / "count", 1, workers, overrides)
    monkeypatch.setattr(Experiment, "_train", lambda self, row, rate, seed: (row, rate))
    best = {"prefixmem": 3e-3}
    monkeypatch.setattr(
        "prefixmem_jax.paper.experiment._last",
        lambda run, key: abs(run[1] - best.get(run[0], 3e-2)),
    )
    assert experiment._choose("baseline")[0] == 3e-2
    for row in TABLES["sweep"][2:]:
        rate, tried = experiment._choose(row)
        assert rate == 3e-3 and list(tried) == ["0.003"]


def test_rows_are_configs_that_any_machine_trains(tmp_path):
    out, overrides = tmp_path / "my out", ["steps=7"]
    generate, *commands = map(
        shlex.split, write_configs("tiny", ["initialisation"], out, overrides)
    )
    made = GeneratorConfig()
    for text in generate[5:]:
        made = override(made, text)
    assert made == SCALES["tiny"].data and generate[:5] == [
        "prefixmem", "data", "generate", "--out", str(out / "tiny" / "data"),
    ]  # fmt: skip
    *trained, (_, verb, *evaluated) = commands
    assert verb == "evaluate" and len(evaluated) == len(TABLES["initialisation"])
    runs = [Path(command[-1]) for command in trained]
    assert set(map(Path, evaluated)) < set(runs) and len(set(runs)) == len(runs) == 12
    for number, (_, verb, file, _, run) in enumerate(trained):
        config = load_config(Path(file))
        assert verb == "train" and config.name == Path(run).name and config.steps == 7
        assert config.data.path == generate[4]
        assert config.init.run is None or Path(config.init.run) in runs[:number]


def test_the_papers_scale_has_the_models_that_its_rows_name(tmp_path):
    write_configs("paper", ["decoders", "tiger"], tmp_path)
    millions = {}
    for row in (*TABLES["decoders"], *TABLES["tiger"]):
        config = load_config(tmp_path / "paper" / "configs" / f"{row}.json", ["mesh.fsdp=1"])
        spec = ModelSpec.create(config, data_vocabulary(config.data), make_mesh(config.mesh))
        found = sum(x.size for x in jax.tree.leaves(spec.params["llm"]))
        millions[row] = round(found / 1e6)
        if spec.table is not None:
            assert (config.sid_encoder.rows, spec.table.tables) == (2_000_000, 16)
    qwen = {"small": 607, "baseline": 1742, "large": 4049}  # with 10,368 tokens more
    assert {row: millions[row] for row in qwen} == qwen
    assert millions["prefixmem"] == millions["baseline"]
    assert 34 <= millions["tiger"] == millions["tiger_prefixmem"] <= 36


def test_runs_that_several_rows_need_are_counted_once():
    rates, seeds = 3, 2
    assert count_runs(["baseline"], rates, seeds) == 4  # three rates, one more seed of the best
    # Its own two seeds, and the three rates that it is chosen between by another row.
    assert count_runs(["suffix"], rates, seeds) == 2 + 3
    assert count_runs(["suffix", "prefixmem"], rates, seeds) == 2 + 4
    # Stage 1 is one of them, and both have rates of their own.
    assert count_runs(["prefixmem_classification"], rates, seeds) == 4 + 4


def cells(text, title, head):
    """What the line that begins with `title`, and the line below it, have under a heading."""
    top, *lines = text.splitlines()
    stop = f"{top}  ".index(f"  {head}  ") + 2 + len(head)  # columns end at the right
    (at,) = (n for n, line in enumerate(lines) if line.startswith(f"{title}  "))
    return [line[:stop].rpartition("  ")[2].strip() for line in lines[at : at + 2]]


@pytest.fixture
def committed():
    return read_result(RESULTS / "tiny_main.json", "main")


def test_the_papers_numbers_are_of_metrics_that_we_have(committed):
    measured = set(committed["rows"]["baseline"]["metrics"])
    for name, row in ROWS.items():
        assert set(row.paper) <= measured, name


def test_splits_and_rates_stand_in_tables_of_their_own(committed):
    splits, rates = describe(committed).split("\n\n")[1:3]
    assert cells(splits, "PrefixMem", "unreachable") == ["21.8", "64.5"]
    assert cells(splits, "flat tokens", "medium") == ["7.9", "34.8"]
    assert cells(splits, "flat tokens", "first codes") == ["13.5", "5.5"]  # codes, no percent
    assert cells(rates, "PrefixMem", "0.03")[0] == "2.2768"
    (line,) = (line for line in rates.splitlines() if line.startswith("PrefixMem  "))
    assert line.split("  ")[-3].endswith("2.3152") and "2.2479*" in line


def test_the_papers_levels_are_counted_from_the_deepest(committed):
    result = committed
    assert "stands beside" not in describe(result)
    data = result["data"]
    for levels in (4, 6):
        renamed = json.loads(json.dumps(result["rows"]))
        for row in renamed.values():
            for part in (row["metrics"], row.get("against_first", {}), *row["by_seed"]):
                accuracies = {name: part.pop(name) for name in [*part] if "tf_" in name}
                for name, value in accuracies.items():
                    level = int(name[18]) + levels - 5
                    part[f"tf_accuracy/level_{level}{name[19:]}"] = value
        of_data = data | {"levels": data["levels"][-1:] * levels, "optimum": None}
        text = describe(result | {"rows": renamed, "data": of_data})
        assert (
            f"the paper's L5 stands beside our L{levels}, its L4 beside our L{levels - 1}" in text
        )
        main, splits = text.split("\n\n")[1:3]
        assert cells(main, "PrefixMem", f"L{levels}") == ["28.7", "54.8"]
        assert cells(main, "flat tokens", f"L{levels - 2}") == ["41.7", "29.2"]
        assert cells(splits, "PrefixMem", "rare") == ["13.6", "57.6"]


def test_a_result_is_shown_again_without_training(committed, tmp_path, refused):
    file = RESULTS / "tiny_main.json"
    done = prefixmem("paper", "main", "--from", file, "--out", tmp_path / "x")
    assert done.stdout.startswith(describe(committed))
    assert (tmp_path / "x" / "main.png").read_bytes().startswith(b"\x89PNG")
    assert [path.name for path in (tmp_path / "x").iterdir()] == ["main.png"]
    (tmp_path / "half.json").write_text('{"table": "main"}')
    whole = json.loads(file.read_text())
    del whole["rows"]["prefixmem"]["metrics"]
    (tmp_path / "damaged.json").write_text(json.dumps(whole))
    for arguments, said in [
        (["rows", "--from", file], "tiny_main.json: this is no result of `prefixmem paper rows`"),
        (["main", "--from", tmp_path / "half.json"], "half.json: this is no result of"),
        (["main", "--from", tmp_path / "damaged.json"], "damaged.json: damaged, not all of"),
        (["main", "--from", tmp_path / "absent.json"], "absent.json"),
        (["main", "--from", file, "steps=4"], "--from trains nothing, so steps=4 means nothing"),
    ]:
        assert said in refused("paper", *arguments)


def test_an_earlier_result_of_data_without_an_optimum_is_judged(tmp_path):
    result = json.loads((RESULTS / "tiny_main.json").read_text())
    del result["data"]["baseline_of_optimum"]
    result["data"]["optimum"] = None
    (tmp_path / "real.json").write_text(json.dumps(result))
    verdict = describe(read_result(tmp_path / "real.json", "main")).splitlines()[-1]
    share = f"{0.13963053 / 0.34991909:.0%}"
    assert verdict.startswith(f"the baseline reaches {share} of what counting reaches")


def test_the_readme_has_the_committed_table(committed):
    text = (ROOT / "README.md").read_text()
    shown = text.partition("<!-- prefixmem paper main -->\n")[2].partition("<!-- end -->")[0]
    assert shown == markdown(committed)
    assert "| PrefixMem | 40.8% | 28.7% (+106%; +13.9 to +15.7 points) | 25.0% |" in shown


def test_the_command_line_knows_every_table_and_scale():
    for table in (*TABLES, "all", "regime"):
        assert parse(["paper", table]).table == table
    for scale in SCALES:
        assert parse(["paper", "main", "--scale", scale]).scale == scale


def test_an_evaluation_stands_until_its_run_is_another(tmp_path):
    config = load_config("paper/tiny")
    run = SimpleNamespace(path=tmp_path, step=600, config=config)
    about = {"split": "test", "step": 600, "config": json.loads(to_json(config))}

    def found(**changes):
        (tmp_path / "metrics.json").write_text(json.dumps(about | changes))
        return _is_evaluated(run)

    assert not _is_evaluated(run)
    assert found()
    # A key that came later, since when all runs before have its default.
    del about["config"]["mesh"]["memory_kind"]
    assert found()
    other = dataclasses.replace(config, seed=1)
    assert not found(config=json.loads(to_json(other)))
    assert not found(step=300) and not found(split="validation") and not found(config="none")


def test_mistakes_are_one_line(workers, tmp_path, refused):
    with pytest.raises(UserError, match="--seeds: expected 1 or more"):
        Experiment("tiny", Path("nowhere"), 0, workers)
    with pytest.raises(UserError, match="--jobs: expected 1 or more, got 0"):
        Workers(0)
    (tmp_path / "tiny" / "data").mkdir(parents=True)
    made = vars(dataclasses.replace(SCALES["tiny"].data, users=7))
    (tmp_path / "tiny" / "data" / ABOUT).write_text(json.dumps({"config": made}))
    with pytest.raises(UserError, match=r"another config \(users is 7 there, 100000 here\)"):
        Experiment("tiny", tmp_path, 1, workers)
    assert "invalid choice: 'maine'" in refused("paper", "maine")
