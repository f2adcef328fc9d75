"""Run folders: what is read of them, how they go on, and what stops them (`test_fault_matrix`: faults)."""

import dataclasses
import itertools
import json
import os
import shutil
import signal
import time
from pathlib import Path

import chex
import jax
import numpy as np
import pytest
from damage import flip, largest
from ended_runs import state_of

from prefixmem_jax.cli import main
from prefixmem_jax.config import Config
from prefixmem_jax.config_files import to_json
from prefixmem_jax.config_groups import (
    CheckpointConfig,
    DataConfig,
    DecoderConfig,
    EvaluationConfig,
    OptimizerConfig,
    SyntheticConfig,
)
from prefixmem_jax.data.pipeline import rows_of_batch
from prefixmem_jax.data.prepare import prepare_data
from prefixmem_jax.errors import Stopped, UserError
from prefixmem_jax.recommender import recommend
from prefixmem_jax.runs.checkpoint import Checkpoints
from prefixmem_jax.runs.metrics import read_metrics
from prefixmem_jax.runs.run import DataDescription, Run
from prefixmem_jax.sid_encoders.prefix_memory import PrefixMemoryConfig
from prefixmem_jax.training import loop, watchdog
from prefixmem_jax.training.hooks import Hook
from prefixmem_jax.training.loop import train
from prefixmem_jax.training_rows import training_source

CONFIG = Config(
    "faults",
    steps=10,
    log_every_steps=4,
    data=DataConfig(
        sequence_length=32,
        batch_size=8,
        max_items=8,
        synthetic=SyntheticConfig(items=60, users=60, codebook_sizes=(6, 8, 8), children=(6, 4, 4)),
    ),
    model=DecoderConfig(layers=1, d_model=16, d_ff=16, head_dim=4),
    sid_encoder=PrefixMemoryConfig(target_levels=(2, 3), orders=2, heads=2, rows=40, d_mem=8),
    optimizer=OptimizerConfig(warmup_steps=2),
    checkpoint=CheckpointConfig(every_steps=5, keep=2),
    evaluation=EvaluationConfig(every_steps=5, validation_examples=8),
)
DATA = prepare_data(CONFIG.data)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained") / "run"
    train(CONFIG, folder, DATA)
    return folder, state_of(folder)[1]


@pytest.fixture
def run(trained, tmp_path):
    """A copy of the run, to be damaged."""
    return Path(shutil.copytree(trained[0], tmp_path / "run"))


def test_reading_needs_only_the_model(run, caplog):
    flip(largest(run / "checkpoints" / "10" / "optimizer"))
    assert Run(run).step == 10 and not caplog.text
    flip(largest(run / "checkpoints" / "10" / "llm"))
    assert Run(run).step == 5 and "10 is damaged (llm/" in caplog.text
    with pytest.raises(UserError, match=r"no whole checkpoint \(llm/.* has changed since"):
        _ = Run(run, step=10).step


def test_a_checkpoint_in_place_of_a_damaged_one_is_not_held_to_its_checksums(run):
    """Where the run is killed before it has written its own."""
    flip(largest(run / "checkpoints" / "10" / "llm"))
    with Checkpoints(run, keep=3) as checkpoints:
        assert checkpoints.choose() == 5
    assert not (run / "checkpoints" / "10").exists()
    shutil.copytree(run / "checkpoints" / "5", run / "checkpoints" / "10")
    assert Run(run).step == 10


def test_a_checkpoint_at_a_chosen_step(run):
    assert Run(run, step=5).step == 5
    with pytest.raises(UserError, match=r"checkpoints: no step 7; it has 10, 5"):
        _ = Run(run, step=7).step
    losses = {r["step"]: r["validation/loss"] for r in read_metrics(run) if "validation/loss" in r}
    assert Run(run, step="best").step == min(losses, key=losses.get)
    (run / "metrics.jsonl").unlink()
    with pytest.raises(UserError, match="no kept checkpoint has a validation loss"):
        _ = Run(run, step="best").step


def state_of_step(run: Path) -> int:
    return max(int(path.name) for path in (run / "checkpoints").iterdir())


def test_a_process_that_is_not_the_first_reads_nothing_that_is_yet_to_be_written(
    tmp_path, monkeypatch
):
    run, description = Run(tmp_path / "run"), DataDescription.of(DATA, CONFIG.data)
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    run.claim(CONFIG, description)
    assert not run.path.exists()
    assert (run.config, run.data_description) == (CONFIG, description)
    assert run.transitions is None


def test_a_finished_run_is_extended(run, caplog):
    longer = dataclasses.replace(CONFIG, steps=12, log_every_steps=1)
    train(longer, run, DATA)
    assert "extended from 10 to 12 steps" in caplog.text
    assert state_of(run)[0] == 12 and Run(run).config == longer
    for changes, words in (
        ({"steps": 5}, "steps is 12 there, 5 here"),
        ({"seed": 3}, "seed is 0 there, 3 here"),
    ):
        with pytest.raises(UserError, match=words):
            train(dataclasses.replace(longer, **changes), run, DATA)


def test_what_was_counted_is_whole_after_a_kill(run):
    """Killed after step 5's checkpoint, when step 4 was the last that was logged."""
    whole = read_metrics(run)[-1]
    shutil.rmtree(run / "checkpoints" / "10")
    records = [r for r in read_metrics(run) if r["step"] <= 4]
    (run / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    train(dataclasses.replace(CONFIG, log_every_steps=1), run, DATA)
    at_4, *others, last = [r for r in read_metrics(run) if "memory_rounds" in r]
    for name in ("step", "tokens", "flops", "memory_overflows"):
        assert last[name] == whole[name]
    for before, after in itertools.pairwise([*others, last]):
        now = after["memory_overflows"] - before["memory_overflows"]
        assert now == (after["memory_rounds"] > 1)
    assert 0 < at_4["memory_overflows"] <= others[0]["memory_overflows"] < last["memory_overflows"]


def test_a_moved_run_recommends_the_same(run, tmp_path):
    before = recommend(Run(run).engine(), [1, 2], 5)
    shutil.move(run, tmp_path / "elsewhere with spaces")
    assert recommend(Run(tmp_path / "elsewhere with spaces").engine(), [1, 2], 5) == before


def test_a_stopped_run_is_resumed_by_its_folder_alone(run, trained, capfd):
    shutil.rmtree(run / "checkpoints" / "10")
    assert main(["resume", str(run)]) == 0
    chex.assert_trees_all_equal(state_of(run)[1], trained[1])
    assert main(["resume", str(run), "optimizer.learning_rate=1"]) == 2
    assert "holds a run with another config (optimizer.learning_rate is" in capfd.readouterr().err
    assert main(["resume", str(run / "checkpoints")]) == 2
    assert "not a run directory" in capfd.readouterr().err


def test_runs_are_listed(trained, tmp_path, capfd):
    """As they are: done, stopped, being trained, or unreadable; and in what they differ."""
    for name in ("a", "b/deep", "c", "d"):
        shutil.copytree(trained[0], tmp_path / name)
    shutil.rmtree(tmp_path / "b" / "deep" / "checkpoints" / "10")
    changed = dataclasses.replace(CONFIG, name="other", seed=7, steps=20)
    (tmp_path / "c" / "config.json").write_text(to_json(changed))
    (tmp_path / "d" / "config.json").write_text("{")
    with Run(tmp_path / "c").lock():
        assert main(["runs", str(tmp_path), "--json", str(tmp_path / "runs.json")]) == 0
    listed = json.loads((tmp_path / "runs.json").read_text())
    assert [(run["state"], run["step"], run["steps"]) for run in listed] == [
        ("done", 10, 10), ("stopped", 5, 10), ("training", 10, 20), ("unreadable", 0, 0),
    ]  # fmt: skip
    assert [run["changes"] for run in listed] == [{}, {}, {"seed": 7, "steps": 20}, None]
    losses = [r["validation/loss"] for r in read_metrics(trained[0]) if "validation/loss" in r]
    assert listed[0]["metric"] == "loss" and listed[0]["best"] == min(losses)
    lines = capfd.readouterr().out.splitlines()
    assert len(lines) == 5 and f"loss {min(losses):.4f}" in lines[1]
    assert "seed=7, steps=20" in lines[3] and "config.json" in lines[4]
    assert not Run(tmp_path / "c").is_locked
    assert main(["runs", str(tmp_path / "runs.json")]) == 2
    assert "runs.json: no such folder" in capfd.readouterr().err


def test_small_data_lowers_the_batch(tmp_path, caplog, monkeypatch):
    config = dataclasses.replace(
        CONFIG,
        steps=1,
        sid_encoder=None,
        data=dataclasses.replace(CONFIG.data, batch_size=4000),
    )
    for _ in range(2):  # the second call finds the run that the first one made
        train(config, tmp_path / "run", DATA)
    assert "data.batch_size=4000: the training data packs into only" in caplog.text
    size = Run(tmp_path / "run").config.data.batch_size
    assert 8 <= size < 4000 and size % 8 == 0  # eight devices share a batch
    monkeypatch.setattr("prefixmem_jax.parallel.mesh.all_devices", lambda: jax.devices()[:1])
    train(dataclasses.replace(config, steps=2), tmp_path / "run", DATA)  # one device goes on alike
    assert Run(tmp_path / "run").step == 2 and Run(tmp_path / "run").config.data.batch_size == size


def test_one_bad_step_is_an_error_and_leaves_no_checkpoint(tmp_path):
    model = dataclasses.replace(CONFIG.model, init_std=1e30)
    config = dataclasses.replace(CONFIG, steps=1, model=model)
    with pytest.raises(UserError, match="step 1: the loss or its gradient is not finite") as error:
        train(config, tmp_path / "run", DATA)
    rows = rows_of_batch(1, len(training_source(config, DATA)), 8, config.seed)
    assert f"the batch, rows {', '.join(map(str, rows))}, with `prefixmem data" in str(error.value)
    assert not Run(tmp_path / "run").has_checkpoint


class Signals(Hook):
    """A signal in the middle of whatever other hooks do, after step 7."""

    def __init__(self, number: int):
        super().__init__(1)
        self.number = number

    def due(self, progress) -> bool:
        return progress.step == 7

    def run(self, progress) -> None:
        os.kill(os.getpid(), self.number)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_after_the_step_and_can_be_gone_on_from(
    number, trained, tmp_path, monkeypatch
):
    run_steps, handler = loop.run_steps, signal.getsignal(number)

    def with_signal(spec, state, iterator, hooks, *others):
        return run_steps(spec, state, iterator, [*hooks, Signals(number)], *others)

    monkeypatch.setattr(loop, "run_steps", with_signal)
    with pytest.raises(Stopped) as stopped:
        train(CONFIG, tmp_path / "run", DATA)
    assert stopped.value.number == number
    assert state_of_step(tmp_path / "run") == 8  # it came while step 7's hooks ran
    monkeypatch.undo()
    train(CONFIG, tmp_path / "run", DATA)
    chex.assert_trees_all_equal(state_of(tmp_path / "run")[1], trained[1])
    assert signal.getsignal(number) is handler


class Sleeps(Hook):
    """Hangs after step 7, for longer than anybody waits."""

    def due(self, progress) -> bool:
        return progress.step == 7

    def run(self, progress) -> None:
        time.sleep(2)


def test_a_run_that_hangs_says_where(trained, tmp_path, monkeypatch, caplog):
    run_steps = loop.run_steps

    def with_sleep(spec, state, iterator, hooks, *others):
        return run_steps(spec, state, iterator, [*hooks, Sleeps(1)], *others)

    monkeypatch.setattr(loop, "run_steps", with_sleep)
    monkeypatch.setattr(watchdog, "HUNG_SECONDS", 1.0)
    train(CONFIG, tmp_path / "run", DATA)
    path = tmp_path / "run" / "hung-process-0.txt"
    assert [line for line in caplog.messages if "after step 7" in line and str(path) in line]
    assert "test_faults_runs.py" in path.read_text() and "in run\n" in path.read_text()
    chex.assert_trees_all_equal(state_of(tmp_path / "run")[1], trained[1])


def test_a_save_that_fails_is_the_runs_failure(tmp_path, monkeypatch):
    """Checksums are written by a thread: what goes wrong there must not be lost."""
    monkeypatch.setattr(
        "prefixmem_jax.runs.checkpoint.write_checksums",
        lambda *arguments: (_ for _ in ()).throw(OSError(28, "No space left on device", "x")),
    )
    with pytest.raises(OSError, match="No space left"):
        train(CONFIG, tmp_path / "run", DATA)


def test_checkpoints_keep_their_checksums(trained):
    names = {path.stem for path in (trained[0] / "checksums").iterdir()}
    assert names == {path.name for path in (trained[0] / "checkpoints").iterdir()} == {"5", "10"}
    listed = json.loads((trained[0] / "checksums" / "10.json").read_text())
    assert len(listed) > 10 and all(len(digest) == 64 for digest in listed.values())
    assert np.all([not Path(name).is_absolute() for name in listed])
