"""Faults, injected for real into a training that was killed at step 80 of 120: a table of what each
does, what it is answered, and what is left.

Every command is a process of its own. What is left is one of three things: a training that ended as
the one that nothing happened to, bit for bit; every file as it was, to go on from once the fault is
mended; or, where it ended after steps, every checkpoint as it was.
"""

import contextlib
import functools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path

import chex
import forked
import numpy as np
import pytest
from array_record.python.array_record_data_source import ArrayRecordDataSource
from array_record.python.array_record_module import ArrayRecordWriter
from conftest import QUICK, ROOT, command_environment, mounted, prefixmem
from damage import flip, largest, truncate
from ended_runs import records_of, state_of

from prefixmem_jax.cli import main
from prefixmem_jax.data.pipeline import rows_of_batch
from prefixmem_jax.runs.checkpoint import Checkpoints
from prefixmem_jax.runs.metrics import read_metrics

STEPS, NEWEST, BAD_STEP = 120, "80", 82
TRAIN = [
    "quickstart/prefixmem", "init.run=none", "init.take=()", "init.fresh=()", f"steps={STEPS}", "checkpoint.every_steps=20", "checkpoint.keep=20",
    "data.batch_size=8", "data.sequence_length=64", "model.layers=1", "model.d_model=32",
    "model.dropout=0.1", "sid_encoder.rows=3000", "evaluation.every_steps=100",
    "evaluation.validation_examples=40", "log_every_steps=1",
]  # fmt: skip
SECONDS = 200


@dataclass(frozen=True)
class Case:
    """A copy of all that a training needs, and of the training itself, for one fault."""

    folder: Path

    @property
    def run(self) -> Path:
        return self.folder / "run"

    @property
    def newest(self) -> Path:
        return self.run / "checkpoints" / NEWEST

    @property
    def rows(self) -> Path:
        return self.folder / "rows" / "rows-00000.array_record"

    @property
    def train(self) -> list[str]:
        return [
            "train", *TRAIN, f"data.path={self.folder}/data", f"data.packed={self.folder}/rows",
            "--out", str(self.run),
        ]  # fmt: skip

    def files(self) -> dict[str, bytes]:
        paths = sorted(path for path in self.folder.rglob("*") if path.is_file())
        return {str(path.relative_to(self.folder)): path.read_bytes() for path in paths}


@pytest.fixture(scope="module")
def ended(tmp_path_factory) -> Case:
    """What nothing happened to."""
    case = Case(tmp_path_factory.mktemp("ended"))
    prefixmem(
        "data", "generate", "--out", case.folder / "data", "users=400",
        "codebook_sizes=(16,16,16,16)", "children=(8,4,4,2)", "groups=4",
    )  # fmt: skip
    prefixmem("data", "pack", *case.train[1:-3], "--out", case.folder / "rows")
    prefixmem(*case.train)
    return case


@pytest.fixture
def case(ended, tmp_path) -> Case:
    """The same as it was when it was killed at step 80, elsewhere."""
    return killed(ended, Case(tmp_path / "case"))


def killed(ended: Case, case: Case) -> Case:
    shutil.copytree(ended.folder, case.folder, dirs_exist_ok=True)
    for path in (case.run / "checkpoints").iterdir():
        if int(path.name) > int(NEWEST):
            shutil.rmtree(path)
            (case.run / "checksums" / f"{path.name}.json").unlink()
    config = case.run / "config.json"
    config.write_text(config.read_text().replace(str(ended.folder), str(case.folder)))
    records = [record for record in read_metrics(case.run) if record["step"] <= int(NEWEST) + 7]
    (case.run / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    return case


end_of = functools.cache(state_of)


def assert_ended_the_same(case: Case, ended: Case) -> None:
    (step, state, data), (_, wanted, wanted_data) = state_of(case.run), end_of(ended.run)
    assert step == STEPS and data == wanted_data
    chex.assert_trees_all_equal(state, wanted)
    assert records_of(case.run) == records_of(ended.run)
    left = {path.name for path in (case.run / "checkpoints").iterdir()}
    assert all(name.isdecimal() for name in left), left


# What is injected. Those that come back as contexts are undone after the command.


def cut_end(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 7)


def put(path: Path, content: bytes) -> None:
    path.write_bytes(content)


def empty(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.mkdir()


def half_written(case: Case) -> None:
    """As Orbax names one that is not finished."""
    half = case.run / "checkpoints" / "100.orbax-checkpoint-tmp"
    shutil.copytree(case.newest / "llm", half / "llm")


def damage_all(case: Case) -> None:
    for path in (case.run / "checkpoints").iterdir():
        flip(largest(path / "llm"))


def other_data(case: Case) -> None:
    shutil.rmtree(case.folder / "data")
    prefixmem(
        "data", "generate", "--out", case.folder / "data", "users=400", "seed=1",
        "codebook_sizes=(16,16,16,16)", "children=(8,4,4,2)", "groups=4",
    )  # fmt: skip


@contextlib.contextmanager
def bad_row(case: Case) -> Iterator[None]:
    """The weights of a row that step BAD_STEP draws, and not step 81, are no numbers."""
    source, whole = ArrayRecordDataSource(str(case.rows)), case.rows.read_bytes()
    files = json.loads((case.rows.parent / "packed.json").read_text())["files"]
    everywhere = sum(file["rows"] for file in files)
    rows = [np.frombuffer(source[number], np.int32).copy() for number in range(len(source))]
    bad = min(rows_of_batch(BAD_STEP, everywhere, 8, 0))  # in the first file, as it happens
    _, segments, _, mask, _ = rows[bad].reshape(5, -1)
    mask.view(np.float32)[segments > 0] = np.nan
    writer = ArrayRecordWriter(str(case.rows), "group_size:1,zstd:1")
    for row in rows:
        writer.write(row.tobytes())
    writer.close()
    yield
    case.rows.write_bytes(whole)


@contextlib.contextmanager
def gone(path: Path) -> Iterator[None]:
    away = path.with_name("away")
    path.rename(away)
    yield
    away.rename(path)


LOCK = "import fcntl, sys; f = open(sys.argv[1], 'a'); fcntl.flock(f, 2); print('held', flush=True); input()"


@contextlib.contextmanager
def another_writer(case: Case) -> Iterator[None]:
    command = [sys.executable, "-c", LOCK, case.run / ".lock"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout.readline() == b"held\n"
        yield
        holder.kill()


@dataclass(frozen=True)
class Fault:
    """One row of the table.

    Attributes:
      inject: done to the case before the command.
      status, words: how the command ends, and what its one line has in it.
      command: after `prefixmem`, of the case; training goes on where it is not said.
      untouched: no file is other than it was when the command began; else the training has ended as
        the one that nothing happened to, or does
      saved: where no checkpoint is other than it was, and the same command is given once it is mended.
    """

    inject: Callable[[Case], AbstractContextManager | None]
    status: int
    words: str
    command: Callable[[Case], list[str]] = field(default=lambda case: case.train)
    untouched: bool = False
    saved: bool = False


def nothing(case: Case) -> None:
    pass


def fresh(*changes: str) -> Callable[[Case], list[str]]:
    """A training of another folder."""
    return lambda case: [*case.train[:-1], str(case.folder / "new"), *changes]


def same(*changes: str) -> Callable[[Case], list[str]]:
    """The same training with other keys."""
    return lambda case: [*case.train, *changes]


def verb(*arguments: str) -> Callable[[Case], list[str]]:
    return lambda case: [argument.format(case=case) for argument in arguments]


DAMAGED = f"checkpoints/{NEWEST} is damaged"
FAULTS = {
    # A damaged checkpoint is said and put aside; the one before it stands for it.
    "a bit of the memory's rows": Fault(lambda case: flip(largest(case.newest / "memory")), 0, DAMAGED),
    "a bit of Adam's moments": Fault(lambda case: flip(largest(case.newest / "optimizer")), 0, DAMAGED),
    "a save that was cut off": Fault(half_written, 0, ""),
    "a record that was cut off": Fault(
        lambda case: cut_end(case.run / "metrics.jsonl"), 0, ""
    ),
    "every checkpoint": Fault(damage_all, 2, "no whole checkpoint", untouched=True),
    # What is not what was written is not guessed at.
    "config.json cut short": Fault(
        lambda case: truncate(case.run / "config.json"), 2, "config.json: not JSON", untouched=True
    ),
    "config.json of bytes": Fault(
        lambda case: put(case.run / "config.json", b"\xff\xfe"), 2, "config.json: not JSON",
        untouched=True,
    ),
    "config.json a list": Fault(
        lambda case: put(case.run / "config.json", b"[]"), 2,
        "config.json: expected an object of keys", untouched=True,
    ),
    "data.json of something else": Fault(
        lambda case: put(case.run / "data.json", b'{"name": 1}'), 2,
        "data.json: not a run's data description", untouched=True,
    ),
    "metrics.jsonl of something else": Fault(
        lambda case: put(case.run / "metrics.jsonl", b"junk\n"), 2,
        "metrics.jsonl: line 1 is no record", untouched=True,
    ),
    "other data in its place": Fault(other_data, 2, "rows: packed with another dataset", untouched=True),
    "the data gone": Fault(
        lambda case: gone(case.folder / "data"), 2, "data: not a folder with items.parquet", untouched=True
    ),
    "packed rows gone": Fault(lambda case: gone(case.rows), 2, "00000.array_record: missing; pack again", untouched=True),
    "packed rows cut short": Fault(
        lambda case: truncate(case.rows), 2, "rows: a file is damaged", untouched=True
    ),
    "a row that is no numbers": Fault(
        bad_row, 2, f"step {BAD_STEP}: the loss or its gradient is not finite", saved=True
    ),
    # Two at once: the second ends, whoever reads is not kept out.
    "another writer": Fault(another_writer, 2, "another process is training this run", untouched=True),
    "another writer, and a reader": Fault(
        another_writer, 0, "", verb("recommend", "{case.run}", "--history", "1,2", "--top", "2"),
        untouched=True,
    ),
    # What is asked for is not what is there, or cannot be.
    "another learning rate": Fault(
        nothing, 2, "another config (optimizer.learning_rate is 0.003 there",
        same("optimizer.learning_rate=1"), untouched=True,
    ),
    "fewer steps": Fault(nothing, 2, f"steps is {STEPS} there, 20 here", same("steps=20"), untouched=True),
    "a key that is none": Fault(nothing, 2, "model.widht", fresh("model.widht=3"), untouched=True),
    "a value that is none": Fault(nothing, 2, "steps: expected int", fresh("steps=many"), untouched=True),
    "other multipliers": Fault(
        nothing, 2, "memory was trained with other hash multipliers",
        lambda case: [
            *fresh()(case), f"init.run={case.run}", "init.take=['memory']",
            "init.fresh=['llm','sid_encoder']", "sid_encoder.seed=3",
        ], untouched=True,
    ),
    "a file where the run should go": Fault(
        lambda case: put(case.folder / "new", b"precious"), 1, "new", fresh(), untouched=True
    ),
    "an export into somebody's folder": Fault(
        nothing, 2, "holds something else than an older export",
        verb("export", "{case.run}", "--out", "{case.folder}/data"), untouched=True,
    ),
    "a step that is not there": Fault(
        nothing, 2, "no step 70; it has 80, 60, 40, 20",
        verb("evaluate", "{case.run}", "--step", "70"), untouched=True,
    ),
}  # fmt: skip


DAMAGES = {
    "a file cut short": lambda newest: truncate(largest(newest / "llm")),
    "a file missing": lambda newest: largest(newest / "llm").unlink(),
    "a part missing": lambda newest: shutil.rmtree(newest / "memory_optimizer"),
    "Orbax's metadata gone": lambda newest: (newest / "_CHECKPOINT_METADATA").unlink(),
    "an empty step": empty,
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_checkpoint_that_is_not_whole_is_put_aside(name, case, caplog):
    """As those above, which a training goes on without."""
    DAMAGES[name](case.newest)
    with Checkpoints(case.run, keep=20) as checkpoints:
        assert checkpoints.choose() == 60
    assert DAMAGED in caplog.text
    assert not case.newest.exists() and list((case.run / "damaged").glob(f"{NEWEST}-*"))


def outcome(fault: Fault, command: list[str], capsys) -> str:
    """How a command ends: in this process, where it starts nothing before it ends."""
    if fault.status != 2 or not fault.untouched:
        return prefixmem(*command, expect=fault.status).stderr
    capsys.readouterr()
    assert main(command) == fault.status
    return capsys.readouterr().err


@pytest.mark.parametrize("name", FAULTS)
@pytest.mark.usefixtures("first_device_alone")
def test_a_fault(name, case, ended, capsys):
    fault = FAULTS[name]
    with fault.inject(case) or contextlib.nullcontext():
        before, command = case.files(), fault.command(case)
        said = outcome(fault, command, capsys)
        after = case.files()
    assert "Traceback" not in said
    if fault.status:
        line = said.splitlines()[-1]
        assert line.startswith("prefixmem: ") and fault.words in line
    else:
        assert fault.words in said
    if fault.untouched:
        assert after == before
    else:
        if fault.saved:
            assert checkpoints_of(after) == checkpoints_of(before)
            prefixmem(*command)
        assert_ended_the_same(case, ended)


def checkpoints_of(files: dict[str, bytes]) -> dict[str, bytes]:
    return {name: files[name] for name in files if name.startswith("run/check")}


@pytest.mark.parametrize(
    "number, saving",
    [
        (signal.SIGKILL, True),
        (signal.SIGTERM, True),
        (signal.SIGINT, False),
    ],
)
def test_a_signal(number, saving, case, ended):
    """While it steps, or in the middle of a save; told to end it saves first."""
    out, err = case.folder / "out", case.folder / "err"
    process = forked.start(forked.command, case.train, command_environment(), out, err)
    until = time.monotonic() + SECONDS
    while not is_at(case.run, saving) and time.monotonic() < until:
        assert process.is_alive(), err.read_text()
        time.sleep(0.002)
    os.kill(process.pid, number)
    process.join(SECONDS)
    told = {signal.SIGKILL: -signal.SIGKILL, signal.SIGTERM: 143, signal.SIGINT: 130}
    assert process.exitcode == told[number], err.read_text()
    assert "Traceback" not in err.read_text()
    if number != signal.SIGKILL:
        saved = max(int(path.name) for path in (case.run / "checkpoints").iterdir())
        assert saved == read_metrics(case.run)[-1]["step"] < STEPS
    prefixmem(*case.train)
    assert_ended_the_same(case, ended)


def is_at(run: Path, saving: bool) -> bool:
    """Whether a training that went on has begun to save, or has done steps since it did."""
    begun = [path.name for path in (run / "checkpoints").glob("*tmp*")]
    if saving:
        return bool(begun)
    records = read_metrics(run)
    return int(NEWEST) + 10 < records[-1]["step"] and not begun and len(records) > 95


def test_a_killed_peer(case, ended):
    """One of two processes: the launcher ends the other, and one process alone goes on."""
    command = [ROOT / "launch" / "local.sh", *case.train[1:], "--processes", "2"]
    environment = {**command_environment(), "XLA_FLAGS": QUICK}
    process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
    until = time.monotonic() + SECONDS
    while not is_at(case.run, saving=False) and time.monotonic() < until:
        assert process.poll() is None
        time.sleep(0.01)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(random.choice(children)), signal.SIGKILL)
    _, errors = process.communicate(timeout=SECONDS)
    assert process.returncode == 128 + signal.SIGKILL
    assert " failed with status 137; stopping the others" in errors
    prefixmem(*case.train)
    (step, state, data), (_, wanted, wanted_data) = state_of(case.run), end_of(ended.run)
    assert step == STEPS and data == wanted_data
    chex.assert_trees_all_close(state.memory, wanted.memory, rtol=1e-3, atol=1e-4)


def test_a_disk_that_cannot_be_written_or_is_full(ended, tmp_path):
    """And when it can be again, the run ends as if nothing had been."""
    disk = tmp_path / "disk"
    with mounted(disk, "size=100m"):
        case = killed(ended, Case(disk))
        used = shutil.disk_usage(disk).used
        for options, words in (
            ("ro", "Read-only file system"),
            (f"rw,size={used // 1024 + 300}k", "No space left on device"),
        ):
            remount(disk, options)
            done = prefixmem(*case.train, expect=1)
            line = done.stderr.splitlines()[-1]
            assert line.startswith("prefixmem: ") and words in line
            assert "Traceback" not in done.stderr
        remount(disk, "rw,size=100m")
        prefixmem(*case.train)
        assert_ended_the_same(case, ended)


def remount(folder: Path, options: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{options}", folder], check=True)
