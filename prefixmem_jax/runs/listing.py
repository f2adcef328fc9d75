"""What runs there are in a folder, and how far each has come."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from prefixmem_jax.config_files import to_json
from prefixmem_jax.errors import UserError
from prefixmem_jax.runs.checkpoint import saved_steps
from prefixmem_jax.runs.metrics import read_metrics
from prefixmem_jax.runs.run import CONFIG, DATA, Run, differences
from prefixmem_jax.storage import walk
from prefixmem_jax.text import aligned, visible

# Keys in which runs differ that a table shows.
SHOWN = 4


@dataclass(frozen=True)
class ListedRun:
    """One run.

    Attributes:
      state: `training` (a process of this machine is at it), `done`, `stopped` (it can go on), or
        `unreadable`.
      step: of the newest checkpoint, 0 without one; steps: it is to make.
      metric, best: what its best checkpoint is chosen by, and the best value so far.
      changes: keys of its config that differ from the first run's, and their values.
      problem: why it is unreadable.
    """

    path: str
    state: Literal["training", "done", "stopped", "unreadable"]
    step: int = 0
    steps: int = 0
    metric: str = ""
    best: float | None = None
    changes: dict[str, Any] | None = None
    problem: str | None = None


def list_runs(folders: Sequence[Path]) -> list[ListedRun]:
    """All runs in folders and below them, by path.

    Raises:
      UserError: a folder is none.
    """
    listed, first = [], None
    for path in sorted({path for folder in folders for path in _find(folder)}):
        try:
            config = json.loads(to_json(Run(path).config))
            first = config if first is None else first
            changed = {key: now for key, _, now in differences(first, config) if key != "name"}
            listed.append(_listed(Run(path), changed))
        except UserError as error:
            listed.append(ListedRun(str(path), "unreadable", problem=str(error)))
    return listed


def describe(listed: Sequence[ListedRun]) -> str:
    """A table, a line for each run."""
    lines = [["run", "state", "step", "best validation", "differs from the first in"]]
    for run in listed:
        if run.state == "unreadable":
            lines.append([visible(run.path), run.state, "-", "-", visible(run.problem)])
            continue
        best = "-" if run.best is None else f"{run.metric} {run.best:.4f}"
        changes = [f"{key}={value}" for key, value in run.changes.items()]
        if len(changes) > SHOWN:
            changes[SHOWN:] = [f"and {len(changes) - SHOWN} more"]
        told = visible(", ".join(changes)) or "-"
        lines.append([visible(run.path), run.state, f"{run.step}/{run.steps}", best, told])
    return "\n".join(aligned(lines, left=(0, 1, 3, 4)))


def as_json(listed: Sequence[ListedRun]) -> list[dict[str, Any]]:
    return [asdict(run) for run in listed]


def _find(folder: Path) -> Iterator[Path]:
    """Run folders, not those within others."""
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; expected one with runs in it")
    for path, below, files in walk(folder):
        if {CONFIG, DATA} <= set(files):
            below.clear()
            yield path


def _listed(run: Run, changes: dict[str, Any]) -> ListedRun:
    options, step = run.config.evaluation, max(saved_steps(run.path), default=0)
    metric = options.select_by or "loss"
    name = f"validation/{metric}"
    values = [record[name] for record in read_metrics(run.path) if name in record]
    best = None
    if values:
        best = min(values) if metric == "loss" else max(values)
    since_best = len(values) - 1 - values.index(best) if values else 0
    done = step >= run.config.steps or 0 < options.patience <= since_best
    state = "training" if run.is_locked else "done" if done else "stopped"
    return ListedRun(str(run.path), state, step, run.config.steps, metric, best, changes)
