"""Kills a training again and again, and compares what comes of it with one that was left alone.

python tests/kill_often.py OUT [--kills 30] [--processes 1] [CONFIG [KEY=VALUE ...]]

The moments are random: while it starts, restores its checkpoint, trains, or saves one; each kill waits
for the phase that was drawn for it, and one that passed unseen is not waited for. With several processes
one of them is killed, and the launcher ends the others. Parameters, tables, optimizer, data and
recorded numbers must end bit for bit the same. How long it takes to start, and to start again, is
printed too: to the first steps that are recorded, with an empty cache of compiled programs at first.
"""

import argparse
import collections
import contextlib
import os
import random
import signal
import statistics
import subprocess
import time
from pathlib import Path

import chex
import jax
import numpy as np
from ended_runs import records_of, state_of

from prefixmem_jax.runs.checkpoint import saved_steps
from prefixmem_jax.runs.metrics import read_metrics

ROOT = Path(__file__).resolve().parents[1]
CONFIG = [
    "recommend/small", "steps=200", "checkpoint.every_steps=20", "evaluation.every_steps=100",
    "evaluation.validation_examples=200", "log_every_steps=5", "data.synthetic.items=5000",
    "data.synthetic.users=5000",
]  # fmt: skip


UNSAVED = 8  # kills before the first checkpoint, after which there will hardly be one

# How long a kill waits once its phase was seen, at most: in seconds, or as --seconds says.
PHASES = {"starting": 5.0, "restoring": 0.1, "training": None, "saving": 0.1}


def phase_of(run: Path, before: int, newest: int, processes: list[int]) -> str:
    """What a training is at.

    Args:
      before, newest: what was recorded, and what was saved, when it began; records after what was
        saved are dropped before it steps.
    """
    step = last_step(run)
    if step == before or step <= newest:
        restoring = newest > 0 and any(restores(process, run) for process in processes)
        return "restoring" if restoring else "starting"
    return "saving" if list((run / "checkpoints").glob("*tmp*")) else "training"


def restores(process: int, run: Path) -> bool:
    """Whether a process holds the run's lock and does not record yet: between, it reads its state."""
    opened = set()
    with contextlib.suppress(OSError):  # it may end, or close one, meanwhile
        for file in Path(f"/proc/{process}/fd").iterdir():
            with contextlib.suppress(OSError):
                opened.add(os.readlink(file))
    folder = run.resolve()
    return f"{folder}/.lock" in opened and f"{folder}/metrics.jsonl" not in opened


def last_step(run: Path) -> int:
    return max((record["step"] for record in read_metrics(run)), default=0)


def children_of(process: subprocess.Popen) -> list[int]:
    path = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    return [int(pid) for pid in path.read_text().split()] if path.exists() else []


def seconds_to_start(command: list, run: Path) -> float:
    """Runs the command to its end; from its start to the first steps that it recorded."""
    begun, started = time.monotonic(), None
    with (run.parent / "log").open("ab") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
        while process.poll() is None:
            if started is None and last_step(run):
                started = time.monotonic() - begun
            time.sleep(0.02)
    if process.returncode:
        raise SystemExit(f"ended with {process.returncode}; see {run.parent / 'log'}")
    return started


def kill_often(command: list, run: Path, kills: int, seconds: float, launcher: bool) -> list[float]:
    """Starts the command until it was killed so often, in each phase after at most so many seconds.

    Returns:
      Of the starts that went so far: seconds to the first steps recorded after a checkpoint.
    """
    draw, phases, done, restarts = random.Random(0), collections.Counter(), 0, []
    while done < kills:
        before, newest = last_step(run), max(saved_steps(run), default=0)
        wanted = draw.choice(list(PHASES)) if newest else "training"
        with (run.parent / "log").open("ab") as log:
            begun, going = time.monotonic(), False
            process = subprocess.Popen(command, stdout=log, stderr=log)
            victims, until = [], None
            while until is None or time.monotonic() < until:
                ended = process.poll()
                if ended is not None:
                    raise SystemExit(
                        f"ended with {ended} after {done} kills; more steps are needed"
                    )
                victims = children_of(process) if launcher else [process.pid]
                phase = phase_of(run, before, newest, victims)
                if phase in ("training", "saving") and newest and not going:
                    going = True
                    restarts.append(time.monotonic() - begun)
                # What goes by unseen is not waited for to the end.
                missed = wanted in ("starting", "restoring") and phase in ("training", "saving")
                if until is None and (phase == wanted or missed):
                    longest = PHASES[wanted]
                    until = time.monotonic() + draw.uniform(0, longest or seconds)
                time.sleep(0.002)
            if not victims:
                continue
            phase = phase_of(run, before, newest, victims)
            subprocess.run(["kill", "-KILL", str(draw.choice(victims))], check=True)
            status = process.wait()
        if status not in (-signal.SIGKILL, 128 + signal.SIGKILL):
            continue  # it was a helper of the launcher, not a training
        done, phases[phase] = done + 1, phases[phase] + 1
        steps = saved_steps(run)
        print(f"kill {done}: {phase}, newest checkpoint {steps[0] if steps else None}", flush=True)
        if not steps and done == UNSAVED:
            raise SystemExit(
                f"no checkpoint after {done} kills; expected a smaller checkpoint.every_steps, or more "
                "--seconds"
            )
    print(f"killed {done} times: {dict(phases)}", flush=True)
    return restarts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument(
        "--seconds", type=float, default=15, help="the longest that it trains before a kill"
    )
    parser.add_argument("config", nargs="*", default=CONFIG)
    options = parser.parse_intermixed_args()
    options.out.mkdir(parents=True, exist_ok=True)
    launcher = options.processes > 1
    command = ["prefixmem", "train", *options.config]
    if launcher:
        command = [ROOT / "launch" / "local.sh", *options.config]
        command += ["--processes", str(options.processes)]
    whole, killed = options.out / "whole", options.out / "killed"
    os.environ["JAX_COMPILATION_CACHE_DIR"] = str(options.out.resolve() / "compiled")
    cold = seconds_to_start([*command, "--out", whole], whole)
    command += ["--out", killed]
    restarts = kill_often(command, killed, options.kills, options.seconds, launcher)
    print(
        f"first steps recorded after {cold:.1f} s at first; again after {statistics.median(restarts):.1f} s "
        f"(median of {len(restarts)}): {statistics.median(restarts) / cold:.2f} x"
    )
    subprocess.run(command, check=True)
    (step, state, data), (wanted_step, wanted, wanted_data) = state_of(killed), state_of(whole)
    assert (step, data) == (wanted_step, wanted_data)
    chex.assert_trees_all_equal(state, wanted)
    assert records_of(killed) == records_of(whole)
    numbers = sum(np.size(leaf) for leaf in jax.tree.leaves(state))
    print(f"step {step}: {numbers:,} numbers and {len(records_of(whole))} records are the same")


if __name__ == "__main__":
    main()
