"""Processes that train runs beside each other, and end with the one that started them."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import command_environment, prefixmem

from prefixmem_jax.config_files import load_config
from prefixmem_jax.errors import Stopped, UserError
from prefixmem_jax.paper.workers import Workers
from prefixmem_jax.runs.metrics import read_metrics
from prefixmem_jax.runs.run import Run

SMALL = [
    "data.synthetic.items=300", "data.synthetic.users=300", "data.batch_size=8",
    "data.sequence_length=64", "model.layers=1", "model.d_model=32", "log_every_steps=1",
    "evaluation.every_steps=1000000", "evaluation.validation_examples=20",
]  # fmt: skip
# Trains for longer than anybody waits.
LONG = """
import sys
from pathlib import Path
from prefixmem_jax.config_files import load_config
from prefixmem_jax.paper.workers import Workers

if __name__ == "__main__":
    with Workers(1) as workers:
        workers.train(load_config("quickstart/baseline", sys.argv[2:]), Path(sys.argv[1]), print)
"""


def config(*overrides):
    return load_config("quickstart/baseline", [*SMALL, *overrides])


def wait_until(what, seconds=120):
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.1)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_a_run_is_saved_where_its_command_is_ended(tmp_path, number):
    (tmp_path / "long.py").write_text(LONG)
    arguments = [tmp_path / "long.py", tmp_path / "run", *SMALL, "steps=1000000"]
    process = subprocess.Popen(
        [sys.executable, *map(str, arguments)],
        env=command_environment(),
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        wait_until(lambda: len(read_metrics(tmp_path / "run")) > 3)
        os.killpg(process.pid, number)
        process.wait(60)
        wait_until(lambda: not processes_of(process.pid))
    finally:
        for left in processes_of(process.pid):
            os.kill(left, signal.SIGKILL)
    assert Run(tmp_path / "run").step >= 3


def processes_of(session):
    """Those that are left of a session."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(ProcessLookupError):
            if os.getsid(int(path.name)) == session:
                found.append(int(path.name))
    return found


@pytest.mark.usefixtures("one_device_elsewhere")
def test_what_a_run_fails_with_is_raised_where_it_was_asked_for(tmp_path):
    (tmp_path / "file").write_text("here")
    with Workers(1) as workers:
        said = []
        workers.train(config("steps=1"), tmp_path / "run", lambda: said.append("started"))
        assert said == ["started"] and Run(tmp_path / "run").step == 1
        with pytest.raises(UserError, match="holds a run with another config"):
            workers.train(config("steps=1", "seed=1"), tmp_path / "run", print)
        with pytest.raises(RuntimeError, match=r"Traceback[\s\S]*NotADirectory"):
            workers.train(config("steps=1"), tmp_path / "file" / "run", print)
        # And the process is still there.
        assert workers.machine()["platform"] == "cpu"
    with pytest.raises(Stopped):
        workers.machine()


def test_the_command_itself_has_no_device(tmp_path, monkeypatch):
    prefixmem("data", "generate", "--out", tmp_path, "users=300", "personal=0",
              "codebook_sizes=(8,8,8,8,8)", "children=(4,2,2,4,4)")  # fmt: skip
    data = [f"data.path={tmp_path}", "data.codebook_sizes=none"]
    monkeypatch.setenv("JAX_PLATFORMS", "cuda")  # which is not there
    assert "prefixes" in prefixmem("paper", "regime", *data).stdout
    done = prefixmem("paper", "main", "--jobs", 1, "--out", tmp_path / "out", *data, expect=2)
    assert "cuda" in done.stderr.splitlines()[-1]
