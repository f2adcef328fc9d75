"""Runs as users start them: stages that feed each other, kills, other configs, two processes."""

import dataclasses
import itertools
import json
import os
import random
import re
import signal
import subprocess
import time
from pathlib import Path

import chex
import fingerprint
import forked
import jax
import numpy as np
import pytest
from conftest import QUICK, ROOT, command_environment, prefixmem
from ended_runs import records_of, state_of

from prefixmem_jax.config_files import load_config
from prefixmem_jax.config_groups import SyntheticConfig
from prefixmem_jax.data.formats.parquet import write_dataset
from prefixmem_jax.data.pipeline import rows_of_batch
from prefixmem_jax.data.prepare import prepare_data
from prefixmem_jax.data.synthetic import make_synthetic
from prefixmem_jax.runs.metrics import read_metrics
from prefixmem_jax.runs.run import Run
from prefixmem_jax.training.flops import PEAK_FLOPS
from prefixmem_jax.training.loop import train
from prefixmem_jax.training_rows import training_source

SMALL = [
    "data.synthetic.items=300",
    "data.synthetic.users=300",
    "data.batch_size=8",
    "data.sequence_length=64",
    "model.layers=1",
    "model.d_model=32",
    "evaluation.every_steps=20",
    "evaluation.validation_examples=40",
    "log_every_steps=5",
]
QUICKSTART = ROOT / "configs" / "quickstart"


@pytest.fixture(scope="module")
def stage_one(tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("stage_one") / "classification"
    prefixmem("train", QUICKSTART / "classification.py", "--out", run, *SMALL, "steps=20")
    return run


def test_stage_one_learns_and_stage_two_takes_its_memory(stage_one, tmp_path):
    losses = [r["loss"] for r in read_metrics(stage_one) if "loss" in r]
    assert losses[-1] < losses[0]
    before = state_of(stage_one)[1]
    arguments = ["train", QUICKSTART / "prefixmem.py", *SMALL, f"init.run={stage_one}", "steps=1"]
    # One step whose warm-up rate is zero leaves what it was given.
    prefixmem(*arguments, "--out", tmp_path / "taken")
    after = state_of(tmp_path / "taken")[1]
    assert np.array_equal(after.memory, before.memory)
    assert not np.array_equal(
        after.params["sid_encoder"]["projection"], before.params["sid_encoder"]["projection"]
    )
    assert set(after.params) == {"sid_encoder", "llm"}
    assert set(before.params) == {"sid_encoder", "head"}


@pytest.mark.parametrize(
    "overrides, words",
    [
        (["sid_encoder.seed=3"], "other hash multipliers"),
        (["sid_encoder.address=suffix"], "memory was trained with orders=3 heads=4 rows=16384 address=prefix"),
        (["sid_encoder.rows=20000"], "memory/rows: expected ("),
        (["init.fresh=('llm',)"], "part 'sid_encoder' must be in exactly one of init.take and init.fresh"),
        (["init.take=('memory','llm')"], "part 'llm' must be in exactly one"),
        (["init.take=('memory','llm')", "init.fresh=('sid_encoder',)"], "no part 'llm'"),
        (["init.take=('memory','tables')"], "no part 'tables' in this model; it has llm, sid_encoder, memory"),
        (["init.run=/nowhere"], "init.run=/nowhere: not a run directory with a checkpoint"),
        (["init.run=none"], "init.take names part 'memory' but init.run is none"),
    ],
)  # fmt: skip
@pytest.mark.usefixtures("first_device_alone")
def test_stage_two_refuses_what_does_not_fit(stage_one, tmp_path, overrides, words, refused):
    assert words in refused(
        "train", QUICKSTART / "prefixmem.py", "--out", tmp_path / "run", *SMALL,
        f"init.run={stage_one}", "steps=1", *overrides,
    )  # fmt: skip
    assert not (tmp_path / "run").exists()  # nothing is left behind


@pytest.mark.usefixtures("first_device_alone")
def test_tokens_that_are_numbered_otherwise_are_not_taken(tmp_path, refused):
    """Their tables have the same shapes."""
    arguments = ["train", QUICKSTART / "baseline.py", *SMALL, "steps=1"]
    prefixmem(*arguments, "--out", tmp_path / "before")
    said = refused(
        *arguments, "--out", tmp_path / "after", f"init.run={tmp_path / 'before'}",
        "init.take=('llm',)", "data.synthetic.codebook_sizes=(64,64,64,32)",
    )  # fmt: skip
    assert "was trained with data.codebook_sizes=(32, 64, 64, 64), here it is (64, 64" in said


EVERYTHING = """
import dataclasses
from prefixmem_jax.config_files import inherit
from prefixmem_jax.config_groups import InitConfig, ItemHeadConfig

def get_config():
    parent = inherit(__file__, {parent!r})
    memory = dataclasses.replace(parent.sid_encoder, target_levels=(1, 3, 4), orders=4)
    return dataclasses.replace(
        parent, sid_encoder=memory, item_head=ItemHeadConfig("memory", negatives=50), init=InitConfig()
    )
"""


def test_a_killed_run_ends_bit_identical(tmp_path):
    """With all that is random or remembered on: dropout, items that are drawn, an average, the best
    validation.
    """
    config = tmp_path / "config.py"
    config.write_text(EVERYTHING.format(parent=str(QUICKSTART / "prefixmem.py")))
    arguments = [
        "train", config, *SMALL, "steps=60", "checkpoint.every_steps=7", "model.dropout=0.2",
        "sid_encoder.dropout=0.1", "optimizer.average_decay=0.99",
        "evaluation.select_by=item_ndcg@10",
    ]  # fmt: skip
    prefixmem(*arguments, "--out", tmp_path / "whole")
    killed = tmp_path / "killed"
    kill_at = random.Random(os.getpid()).randint(15, 45)
    process = forked.start(
        forked.command, [*map(str, arguments), "--out", str(killed)], command_environment(),
        tmp_path / "out", tmp_path / "err",
    )  # fmt: skip
    deadline = time.monotonic() + 200
    while time.monotonic() < deadline:
        records = read_metrics(killed)
        if records and records[-1]["step"] >= kill_at:
            break
        assert process.is_alive(), "the run ended before it was killed"
        time.sleep(0.01)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    last = read_metrics(killed)[-1]["step"]
    assert kill_at <= last < 60, (kill_at, last)

    prefixmem(*arguments, "--out", killed)
    whole_step, whole, whole_data = state_of(tmp_path / "whole")
    step, state, data = state_of(killed)
    assert (step, data) == (whole_step, whole_data) and step == 60
    chex.assert_trees_all_equal(state, whole)
    # Each step once, with the same numbers.
    assert records_of(killed) == records_of(tmp_path / "whole")
    kept, best = {int(path.name) for path in (killed / "checkpoints").iterdir()}, Run(killed).step
    assert kept == {60, 56, best} and best % 20 == 0  # the newest two, and the best


def test_a_run_that_diverges_stops_before_it_saves(tmp_path):
    """Though it would save more often than it logs; a run of one bad step is no success either."""
    arguments = [
        "train", QUICKSTART / "baseline.py", "--out", tmp_path / "run", *SMALL, "steps=30",
        "checkpoint.every_steps=1", "optimizer.warmup_steps=3", "optimizer.learning_rate=1e38",
    ]  # fmt: skip
    done = prefixmem(*arguments, expect=2)
    last = done.stderr.strip().splitlines()[-1]
    failed = re.match(r"prefixmem: step (\d+): the loss or its gradient is not finite", last)
    step, state, _ = state_of(tmp_path / "run")
    assert step == int(failed[1]) - 1  # saved after every step, and not after this one
    chex.assert_tree_all_finite(state)


def test_a_run_does_not_go_on_with_other_data(tmp_path):
    process = SyntheticConfig(items=300, users=300)
    write_dataset(tmp_path / "data", make_synthetic(process)[0])
    arguments = ["train", QUICKSTART / "baseline.py", "--out", tmp_path / "run", *SMALL, "steps=2"]
    prefixmem(*arguments, f"data.path={tmp_path / 'data'}")
    (tmp_path / "data").rename(tmp_path / "moved")  # the same, elsewhere
    prefixmem("resume", tmp_path / "run", f"data.path={tmp_path / 'moved'}", "steps=3")
    assert Run(tmp_path / "run").config.data.path == str(tmp_path / "moved")
    assert Run(tmp_path / "run").step == 3
    write_dataset(tmp_path / "data", make_synthetic(dataclasses.replace(process, seed=1))[0])
    done = prefixmem("resume", tmp_path / "run", f"data.path={tmp_path / 'data'}", expect=2)
    assert "was trained on other data" in done.stderr


def test_a_saved_config_runs_again_to_the_same_numbers(stage_one, tmp_path):
    prefixmem("train", stage_one / "config.json", "--out", tmp_path / "again")
    again, first = state_of(tmp_path / "again")[1], state_of(stage_one)[1]
    chex.assert_trees_all_equal(again, first)


def test_a_run_moves_from_devices_to_processes_and_back(stage_one, tmp_path):
    """Four devices, then two processes of two with the memory on the host, one of which is
    interrupted, then eight devices: the batches and losses of one device that was left alone.
    """
    config, run = QUICKSTART / "prefixmem.py", tmp_path / "moved"
    arguments = [
        *SMALL, f"init.run={stage_one}", "steps=60", "checkpoint.every_steps=60",
        "objective=fingerprint:Fingerprint", "log_every_steps=1",
    ]  # fmt: skip
    prefixmem("train", config, *arguments, "--out", tmp_path / "one")
    alone = ["prefixmem", "train", config, *arguments, "--out", run]
    launched = [
        ROOT / "launch" / "local.sh", config, "--processes", "2", *alone[3:],
        "mesh.memory_kind=pinned_host",
    ]  # fmt: skip

    def leg(command: list, devices: int, told_at: int | None, number: int = signal.SIGTERM) -> None:
        flags = f"--xla_force_host_platform_device_count={devices} {QUICK}"
        environment = {
            **command_environment(),
            "XLA_FLAGS": flags,
            "PYTHONPATH": str(ROOT / "tests"),
        }
        process = subprocess.Popen(command, env=environment)
        if told_at is None:
            assert process.wait(300) == 0
            return
        deadline = time.monotonic() + 200
        while not any(r["step"] >= told_at for r in read_metrics(run)):
            assert process.poll() is None, "the run ended before it was told to"
            assert time.monotonic() < deadline
            time.sleep(0.01)
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        os.kill(int(children[0]) if command is launched else process.pid, number)
        assert process.wait(100) == 128 + number
        saved = max(int(path.name) for path in (run / "checkpoints").iterdir())
        assert told_at <= saved < 60

    leg(alone, 4, told_at=5)
    leg(launched, 2, told_at=25, number=signal.SIGINT)
    leg(alone, 8, told_at=None)
    one, moved = read_metrics(tmp_path / "one"), read_metrics(run)
    assert [r["step"] for r in one] == [r["step"] for r in moved]
    drawn = [r["batch"] for r in moved if "batch" in r]
    config = Run(run).config
    source = training_source(config, prepare_data(config.data))
    rows = [fingerprint.of_rows(source[i].tokens[None]) for i in range(len(source))]
    expected = [rows_of_batch(step, len(rows), 8, config.seed) for step in range(1, 61)]
    assert drawn == [sum(rows[row] for row in batch) % 2**32 for batch in expected]
    assert len(set(drawn)) == 60 and len(set(rows)) == len(rows) < 8 * 60
    epoch = [row for batch in expected for row in batch][: len(rows)]
    assert sorted(epoch) == list(range(len(rows)))  # each exactly once, before any comes again
    for a, b in zip(one, moved, strict=True):
        for name in a.keys() - {"memory_rounds", "memory_rows", "memory_overflows"}:
            if not name.endswith(("seconds", "_per_second")):
                assert b[name] == pytest.approx(a[name], rel=1e-4), (a["step"], name)
        assert b.get("loss", 0) == pytest.approx(a.get("loss", 0), abs=1e-5)
    (_, state, data), (_, other, other_data) = (state_of(path) for path in (tmp_path / "one", run))
    assert data == other_data
    np.testing.assert_allclose(other.memory, state.memory, rtol=1e-3, atol=1e-5)


def test_metrics_reach_tensorboard_and_jsonl(stage_one):
    records = read_metrics(stage_one)
    first = records[0]
    assert {
        "loss",
        "accuracy/level_4",
        "tokens",
        "seconds",
        "flops",
        "memory_rounds",
    } <= first.keys()
    by_part = [first[f"gradient_norm/{part}"] for part in ("head", "sid_encoder", "memory")]
    assert first["gradient_norm"] == pytest.approx(np.linalg.norm(by_part)) and min(by_part) > 0
    last = records[-1]
    assert 0 < last["input_seconds"] + last["saving_seconds"] < last["seconds"]
    assert any("validation/accuracy/level_4" in record for record in records)
    assert list((stage_one / "tensorboard").glob("events.*"))
    config = json.loads((stage_one / "config.json").read_text())
    assert config["steps"] == 20 and config["model"]["d_model"] == 32
    assert "mfu" not in last  # a CPU's peak is not known
    before, after = [record for record in records if "memory_rows" in record][-2:]
    steps, seconds = (after[name] - before[name] for name in ("step", "seconds"))
    assert after["memory_rows"] > 0
    pace = after["memory_rows"] * steps / seconds
    assert after["memory_rows_per_second"] == pytest.approx(pace)


def test_logs_say_what_share_of_the_peak_is_used(tmp_path, monkeypatch):
    """Of a device whose peak is said to be known; the first interval has none: it compiles."""
    monkeypatch.setitem(PEAK_FLOPS, jax.devices()[0].device_kind, 1e9)
    train(load_config(str(QUICKSTART / "classification.py"), [*SMALL, "steps=15"]), tmp_path)
    first, *others = [r for r in read_metrics(tmp_path) if "loss" in r]
    assert "mfu" not in first and len(others) == 2
    for before, after in itertools.pairwise([first, *others]):
        flops, seconds = (after[name] - before[name] for name in ("flops", "seconds"))
        assert after["mfu"] == pytest.approx(flops / seconds / 1e9 / jax.device_count())
