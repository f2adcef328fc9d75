"""Faults on the command line: one line and a status, or the same answer whatever stands around it."""

import argparse
import copy
import dataclasses
import errno
import io
import json
import logging
import os
import re
import shutil
import sys
import threading
import warnings

import jax
import numpy as np
import pytest
from absl import logging as absl_logging
from conftest import ROOT, python_process
from matplotlib.figure import Figure
from models import make_run, small_config

from prefixmem_jax import cli
from prefixmem_jax.cli import verbs
from prefixmem_jax.config import Config
from prefixmem_jax.config_files import load_config, to_json
from prefixmem_jax.config_groups import DecoderConfig, EvaluationConfig
from prefixmem_jax.data.formats.parquet import write_dataset
from prefixmem_jax.data.prepare import prepare_data
from prefixmem_jax.errors import UserError
from prefixmem_jax.evaluation import comparison
from prefixmem_jax.evaluation.report import plot_recall, text_table, write_comparison
from prefixmem_jax.files import write_json
from prefixmem_jax.parallel.mesh import all_devices
from prefixmem_jax.planning import plan as planning
from prefixmem_jax.planning import topology
from prefixmem_jax.recommender import recommend
from prefixmem_jax.runs.run import DataDescription, Run
from prefixmem_jax.text import visible

NASTY = "a $^{ % \n<b>\x1b[31m"
DECODER = DecoderConfig(layers=1)


def failed(capsys, status: int, *arguments: object) -> str:
    """The one line that a command ends with."""
    capsys.readouterr()
    assert cli.main([str(argument) for argument in arguments]) == status
    output = capsys.readouterr()
    assert output.out == "" and output.err.count("\n") == 1, output
    assert "\x1b" not in output.err and len(output.err) < 600
    return output.err


def printed(capsys, *arguments: object) -> str:
    capsys.readouterr()
    assert cli.main([str(argument) for argument in arguments]) == 0
    return capsys.readouterr().out


# Arguments.


@pytest.mark.parametrize(
    "arguments, words",
    [
        ("plan quickstart/baseline --devices 0", "prefixmem plan: argument --devices: expected 1 to 1024, got 0; see prefixmem plan --help"),
        ("plan quickstart/baseline --devices 100000", "--devices: expected 1 to 1024, got 100000"),
        ("plan quickstart/baseline --devices two", "--devices: expected 1 to 1024, got two"),
        ("plan quickstart/baseline --devices 2 --slices 2", "--slices goes with --topology"),
        ("plan quickstart/baseline --devices 2 --json /nowhere/plan.json", "--json: no such folder: /nowhere"),
        ("plan quickstart/baselin --devices 2", "no such config file; did you mean quickstart/baseline?"),
        ("evaluate RUN --users -3", "--users: expected 0 or more, got -3"),
        ("evaluate RUN --beam 0", "--beam: expected 1 or more, got 0"),
        ("evaluate RUN --step bets", "--step: expected 0 or more, got bets"),
        ("evaluate RUN --split tests", "--split: invalid choice: 'tests'"),
        ("recommend RUN --top ²", "--top: expected 1 or more, got ²"),
        ("recommend RUN --top " + "9" * 5000, "--top: expected 1 or more, got 999"),
        ("recommend RUN --step -1", "--step: expected 0 or more, got -1"),
        ("export RUN", "the following arguments are required: --out"),
        ("trian", "argument VERB: invalid choice: 'trian'"),
        ("train quickstart/baseline --epochs 3", "prefixmem: unrecognized arguments: --epochs 3"),
        ("train quickstart/baseline optimizer.beta1=2.0", "optimizer.beta1: expected less than 1, got 2.0"),
        ("train quickstart/baseline data.max_items=1e6", "data.max_items: expected less than or equal to 100000"),
        ("train quickstart/baseline --profile 3", "--profile: expected FIRST:LAST"),
        ("train /nowhere/\x1b[31m\n.py", "/nowhere/\\x1b[31m\\n.py: no such config file"),
        ("recommend /nowhere", "/nowhere: not a run directory"),
    ],
)  # fmt: skip
def test_mistakes_in_arguments_are_one_line(capsys, arguments, words):
    assert words in failed(capsys, 2, *arguments.split(" "))


def test_help_teaches_every_verb(capsys):
    help_text = printed(capsys, "--help")
    assert printed(capsys) == help_text  # nothing asked for
    verbs = re.findall(r"^    (\w+)", help_text, re.MULTILINE)
    assert len(verbs) == 15
    for verb in verbs:
        assert f"examples:\n  prefixmem {verb} " in printed(capsys, verb, "--help")
    benchmarks = re.findall(r"^    (\w+)", printed(capsys, "bench"), re.MULTILINE)
    assert len(benchmarks) == 6
    for name in benchmarks:
        assert f"examples:\n  prefixmem bench {name}" in printed(capsys, "bench", name, "--help")


# What ends a verb early.


def ends_with(monkeypatch, action) -> None:
    """Any command line now runs this."""
    options = argparse.Namespace(verb=lambda options: action())
    monkeypatch.setattr(cli, "parse", lambda arguments: options)


def raises(error: BaseException):
    def action():
        raise error

    return action


@pytest.mark.parametrize(
    "action, status, line",
    [
        (raises(UserError("two\nlines\x1b[2J")), 2, r"two\nlines\x1b[2J"),
        (raises(OSError(errno.ENOSPC, "No space left on device", "/full/x")), 1, "/full/x: No space left on device"),
        (raises(OSError(errno.EROFS, "Read-only file system", "a", None, "/read/b")), 1, "/read/b: Read-only file system"),
        (raises(PermissionError(errno.EACCES, "Permission denied", "/root/x")), 1, "/root/x: Permission denied"),
        (raises(OSError("640 requested and 0 written")), 1, "640 requested and 0 written"),
        (raises(TimeoutError()), 1, "TimeoutError"),
        (lambda: os.open("/proc", os.O_RDWR), 1, "/proc: Is a directory"),
        (lambda: os.stat(b"/nowhere/\xff"), 1, "b'/nowhere/\\xff': No such file or directory"),
        (lambda: np.empty(10**14), 1, "not enough memory (Unable to allocate"),
        (raises(RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes.\nmore")), 1, "not enough memory (RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes.)"),
        (raises(KeyboardInterrupt()), 130, "interrupted"),
    ],
)  # fmt: skip
def test_whatever_ends_a_verb_is_one_line(monkeypatch, capsys, action, status, line):
    ends_with(monkeypatch, action)
    assert failed(capsys, status).startswith(f"prefixmem: {line}")


@pytest.mark.parametrize("histories", [None, "histories.parquet"])
def test_an_interrupted_command_says_that_it_goes_on_where_it_does(monkeypatch, capsys, histories):
    monkeypatch.setattr(verbs, "recommend", lambda options: raises(KeyboardInterrupt())())
    options = argparse.Namespace(verb=verbs.recommend, histories=histories)
    monkeypatch.setattr(cli, "parse", lambda arguments: options)
    more = "" if histories is None else "; the same command goes on from what was saved"
    assert failed(capsys, 130) == f"prefixmem: interrupted{more}\n"


def test_a_folder_where_a_file_is_to_be_written_is_one_line(monkeypatch, capsys, tmp_path):
    (tmp_path / "plan.json").mkdir()
    ends_with(monkeypatch, lambda: write_json(tmp_path / "plan.json", {}))
    line = failed(capsys, 1)
    assert line == f"prefixmem: {tmp_path}/plan.json: Is a directory\n"
    assert list(tmp_path.iterdir()) == [tmp_path / "plan.json"]


def test_a_mistake_of_ours_keeps_its_traceback(monkeypatch):
    ends_with(monkeypatch, raises(ValueError("a bug")))
    with pytest.raises(ValueError, match="a bug"):
        cli.main([])


def test_only_what_we_have_to_say_is_shown(monkeypatch, capsys):
    def noisy():
        warnings.warn("of a library", stacklevel=1)
        absl_logging.error("of Orbax")
        logging.getLogger("prefixmem_jax.runs.checkpoint").warning("kept %s", "the\nnewest")
        logging.getLogger("prefixmem_jax.runs.boards").info("it is there")
        logging.getLogger("prefixmem_jax.runs.boards").debug("unseen")
        thread = threading.Thread(target=raises(OSError("in a thread")))
        thread.start()
        thread.join()

    monkeypatch.setattr(threading, "excepthook", threading.excepthook)
    ends_with(monkeypatch, noisy)
    for _ in range(2):  # a line is a line, however often the command was run here
        assert cli.main([]) == 0
        assert capsys.readouterr() == ("", "prefixmem: kept the\\nnewest\nprefixmem: it is there\n")


ENDLESS = """
import argparse, sys
from prefixmem_jax import cli
def verb(options):
    while True:
        print("x" * 100)
cli.parse = lambda arguments: argparse.Namespace(verb=verb)
sys.exit(cli.main())
"""
SHORT = ENDLESS.replace("while True", "if True")


@pytest.mark.parametrize("script, lines", [(ENDLESS, 1), (SHORT, 0)])
def test_a_pipe_that_nobody_reads_on_ends_quietly(script, lines):
    process = python_process(script)
    for _ in range(lines):
        process.stdout.readline()
    process.stdout.close()
    process.stdin.close()
    assert process.stderr.read() == "" and process.wait(30) == 141


@pytest.mark.parametrize("encoding", ["ascii", "utf-8"])
def test_titles_that_a_terminal_cannot_show_are_escaped(encoding):
    script = ENDLESS.replace("while True", "if True").replace('"x" * 100', "input()")
    process = python_process(script, PYTHONIOENCODING=encoding)
    output, errors = process.communicate("caf\N{LATIN SMALL LETTER E WITH ACUTE}\n", timeout=30)
    assert errors == "" and output.startswith("caf")


# Devices and processes.


@pytest.mark.parametrize("platform", ["cuda", "nonsense"])
def test_devices_that_are_not_there_are_one_line(platform):
    script = "import sys\nfrom prefixmem_jax.cli import main\nsys.exit(main())"
    process = python_process(script, "recommend", "/nowhere", JAX_PLATFORMS=platform)
    output, errors = process.communicate(timeout=60)
    assert (output, process.returncode) == ("", 2) and errors.count("\n") == 1
    assert errors.startswith(f"prefixmem: JAX_PLATFORMS={platform}: no such device here (")


def test_devices_that_are_there_are_found():
    assert all_devices() == jax.devices()


@pytest.mark.parametrize(
    "devices, words", [(3, "data.batch_size=40 does not divide by 3"), (9, "JAX has 8")]
)
def test_plans_for_devices_that_do_not_fit_are_refused(devices, words):
    with pytest.raises(UserError) as error:
        planning.plan(load_config("quickstart/baseline"), devices=devices)
    assert words in str(error.value) and "\n" not in str(error.value)


def test_hints_name_no_published_package(monkeypatch):
    monkeypatch.setattr(topology.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=re.escape("pip install '.[tpu]'")):
        topology.pod_devices("v5e:4x4")
    texts = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *(ROOT / "prefixmem_jax").rglob("*.py")]
    for path in texts:
        assert not re.search(r"pip install '?prefixmem", path.read_text()), path


# Runs: what is compared, where the data lie, how wide the search is.


def other(config: Config, data: dict, synthetic: dict, **changes) -> Config:
    """The config with other keys of `data` and `data.synthetic`, and others."""
    process = dataclasses.replace(config.data.synthetic, **synthetic)
    data = dataclasses.replace(config.data, synthetic=process, **data)
    return dataclasses.replace(config, data=data, **changes)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A folder of runs; all but the first are called by what is other about them."""
    folder = tmp_path_factory.mktemp("runs")
    config = small_config(DECODER, 0)
    (folder / "plain").mkdir()
    make_run(folder / "plain", config)
    for name, changed in {
        NASTY: config,
        "_data": other(config, {}, {"users": 61}),
        "catalogue": other(config, {}, {"seed": 3}),
        "split": other(config, {"split": "users", "holdout": 0.2}, {}),
        "beam": other(config, {}, {}, evaluation=EvaluationConfig(beam=7)),
        "users": other(config, {}, {}, evaluation=EvaluationConfig(users=9)),
    }.items():
        shutil.copytree(folder / "plain", folder / name)
        description = DataDescription.of(prepare_data(changed.data), changed.data)
        write_json(folder / name / "data.json", dataclasses.asdict(description))
        (folder / name / "config.json").write_text(to_json(changed))
    return folder


@pytest.mark.parametrize(
    "other, words",
    [
        ("_data", "the dataset's sha256 is"),
        ("catalogue", "the catalogue's sha256 is"),
        ("split", "data.split is leave_two_out of the one, users of the other; evaluate each by itself"),
        ("beam", "evaluation.beam is 20 of the one, 7 of the other; set it for both with --beam N"),
        ("users", "evaluation.users is 0 of the one, 9 of the other; set it for both with --users N"),
    ],
)  # fmt: skip
def test_runs_that_cannot_stand_in_one_table_are_refused(runs, capsys, other, words):
    line = failed(capsys, 2, "evaluate", runs / "plain", runs / other, "--out", runs / "compared")
    assert f"evaluate: {runs}/plain and {runs}/{other} cannot be compared: {words}" in line
    for name in ("plain", other):
        assert not (runs / name / "metrics.json").exists()
    assert not (runs / "compared").exists()


def test_names_of_runs_are_shown_as_they_are(runs, capsys, monkeypatch, tmp_path):
    def evaluate_run(run, data, options, split):
        np.savez(run.path / "scores.npz", **{"tf_accuracy/level_4": np.ones(len(data.split.test))})
        about = {"beam": 5, "test_users": 60, "retrieval_users": 5, "collisions": "counted"}
        about["exclude_seen"] = True
        return {"tf_accuracy/level_4": 1.0, "dataset_sha256": data.dataset.sha256, **about}

    monkeypatch.setattr(comparison, "evaluate_run", evaluate_run)
    arguments = ("evaluate", runs / "plain", runs / NASTY, "--out", tmp_path)
    lines = printed(capsys, *arguments).splitlines()
    assert lines[1].split() == ["metric", "plain", *visible(NASTY).split()]
    assert lines[-2].startswith(f"{visible(NASTY)}  tf_accuracy/level_4  +0.0000")
    assert lines[-1].endswith(f"/{visible(NASTY)}/metrics.json")
    assert set(json.loads((tmp_path / "results.json").read_text())) == {"plain", NASTY}


def test_a_runs_folder_may_have_any_name(runs):
    read = [Run(runs / name).engine(devices=jax.devices()[:1]) for name in ("plain", NASTY)]
    leaves = [jax.tree.leaves((engine.params, engine.memory)) for engine in read]
    assert all(map(np.array_equal, *leaves))


def test_plots_show_any_name(tmp_path, monkeypatch):
    shown = []
    save = Figure.savefig

    def savefig(figure, *arguments, **options):
        legends = [
            figure.legends,
            *(axis.get_legend() and [axis.get_legend()] for axis in figure.axes),
        ]
        shown.append(
            [t.get_text() for group in legends if group for one in group for t in one.get_texts()]
        )
        save(figure, *arguments, **options)

    monkeypatch.setattr(Figure, "savefig", savefig)
    metrics = {"item_recall@5/constrained": 0.5, "tf_accuracy/level_1": 0.5}
    results = {name: metrics for name in ("plain", NASTY, "_data", "$x$", "a_b\\c")}
    names = ["plain", visible(NASTY), " _data", "$x$", "a_b\\c"]
    plot_recall(tmp_path / "recall.png", results)
    write_comparison(tmp_path, results, 1)
    assert shown == [names] * 4
    assert all(name.strip() in text_table(results, 1) for name in names)


@pytest.fixture(scope="module")
def engine(runs):
    run = Run(runs / "plain")
    return run.engine(devices=jax.devices()[:1])


@pytest.fixture
def one_engine(engine, monkeypatch):
    """Verbs use the one engine that is compiled; the runs and steps that they open are kept."""
    opened = []

    def of(run, catalog=None):
        opened.append((run.path.name, run.step))
        same = copy.copy(engine)
        same.catalog = engine.catalog if catalog is None else run.checked(catalog)
        return same

    monkeypatch.setattr(Run, "engine", of)
    return opened


def test_the_first_items_are_the_same_for_every_top(engine):
    best = recommend(engine, "5,9", 20)
    assert len(best) == 20
    for top in (1, 3, 10):
        assert recommend(engine, [5, 9], top) == best[:top]


def test_the_search_is_as_wide_as_the_run_says(engine, monkeypatch):
    searched = []

    def search(histories, beams, **rest):
        searched.append(beams)
        return np.full((1, beams, 4), -1), np.full((1, beams), -np.inf)

    monkeypatch.setattr(engine, "search", search)
    for top, beam in ((2, None), (2, 30), (25, None), (10**9, None), (3, 3)):
        assert recommend(engine, [5], top, beam=beam) == []
    assert searched == [20, 30, 25, len(engine.catalog), 3]


@pytest.mark.parametrize(
    "history, options, words",
    [
        ([5, 150], {}, "history: expected items 0..149, got [5, 150]"),
        ([-1], {}, "history: expected items 0..149, got [-1]"),
        ("1", {"top": 0}, "--top: expected 1 or more, got 0"),
        ("1", {"beam": 2}, "--beam: expected as many as --top, 3, or more, got 2"),
    ],
)
def test_what_cannot_be_recommended_is_refused(engine, history, options, words):
    with pytest.raises(UserError) as error:
        recommend(engine, history, **{"top": 3, **options})
    assert words in str(error.value)


def test_the_same_items_may_lie_elsewhere(runs, one_engine, capsys, tmp_path):
    data = Run(runs / "plain").data()
    write_dataset(tmp_path / NASTY, data.dataset)
    asked = ("recommend", runs / "plain", "--history", "5,9", "--top", 20)
    own = printed(capsys, *asked).splitlines()
    assert printed(capsys, *asked, "--data", tmp_path / NASTY).splitlines() == own
    titles = ["\x1b[31mred\nline\x07", "\ud800 \u202e", None, "caf\xe9 \u65e5"]
    shown = [r"\x1b[31mred\nline\x07", r"\ud800 \u202e", "", titles[3]]
    sids = data.catalog.sids.tolist()
    lines = [{"item": n, "sid": sid, "title": titles[n % 4]} for n, sid in enumerate(sids)]
    path = tmp_path / "items.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    read = printed(capsys, *asked, "--data", path).splitlines()
    for line, same in zip(read[1:], own[1:], strict=True):
        item, title = same.split()[3], same.index("synthetic")
        assert line == f"{same[:title]}{shown[int(item) % 4]}"
    assert len({int(line.split()[3]) % 4 for line in read[1:]}) == 4


def test_another_catalogue_elsewhere_is_refused(runs, capsys, tmp_path):
    write_dataset(tmp_path / "other", Run(runs / "catalogue").data().dataset)
    asked = ("recommend", runs / "plain", "--history", "5", "--data")
    assert "was trained with another catalogue" in failed(capsys, 2, *asked, tmp_path / "other")
    assert "not a folder with items.parquet" in failed(capsys, 2, *asked, tmp_path / "nowhere")
    (tmp_path / "items.jsonl").write_bytes(b"\x00\xff")
    line = failed(capsys, 2, *asked, tmp_path / "items.jsonl")
    assert "items.jsonl: line 1: not a JSON object" in line
    asked = ("export", runs / "plain", "--out", tmp_path / "out", "--data", tmp_path / "other")
    assert "was trained with another catalogue" in failed(capsys, 2, *asked)
    assert not (tmp_path / "out").exists()


def test_histories_are_read_line_after_line(runs, one_engine, capsys, monkeypatch):
    text = "\n   \n²\n,,\n" + "9" * 5000 + "\n5,9\n900\n"
    monkeypatch.setattr(sys, "stdin", io.StringIO(text))
    capsys.readouterr()
    assert cli.main(["recommend", str(runs / "plain"), "--top", "1"]) == 0
    output = capsys.readouterr()
    assert output.out.count("rank  log-prob") == 1
    refused = output.err.splitlines()[1:]
    shown = ["²", "", "9" * 30 + "...", "900"]
    assert refused == [
        f"prefixmem: --history: '{one}' is not an item id; expected 0..149" for one in shown
    ]


def test_a_checkpoint_can_be_chosen(runs, one_engine, capsys):
    asked = ("recommend", runs / "plain", "--history", "5", "--step")
    assert printed(capsys, *asked, 0) == printed(capsys, *asked[:-1])
    assert one_engine == [("plain", 0)] * 2


@pytest.mark.parametrize("verb", ["recommend", "evaluate", "export"])
def test_a_checkpoint_that_is_not_there_is_refused(runs, capsys, verb):
    out = () if verb == "recommend" else ("--out", runs / "out")
    before = sorted(runs.rglob("*"))
    assert "no step 7; it has 0" in failed(capsys, 2, verb, runs / "beam", *out, "--step", 7)
    assert sorted(runs.rglob("*")) == before
