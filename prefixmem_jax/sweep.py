"""Trains a config at every combination of some keys' values, one run after the other."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from prefixmem_jax.config import Config
from prefixmem_jax.config_files import load_config
from prefixmem_jax.data.prepare import TrainingData
from prefixmem_jax.errors import UserError
from prefixmem_jax.files import write_json
from prefixmem_jax.runs.metrics import read_metrics
from prefixmem_jax.text import aligned
from prefixmem_jax.training.loop import train
from prefixmem_jax.training_rows import needed_data, training_data

MOST_RUNS = 1000


def sweep(
    config: str | Path, overrides: Sequence[str], out: Path, say: Any = lambda text: None
) -> list[dict[str, Any]]:
    """Trains every combination, in order; runs that `out` holds already go on, or are done.

    Args:
      overrides: `key=a,b,c` tries each value; a value that has commas itself stands in brackets,
        `key=(1,3),(2,)`. `key=a` is the same for all.
      out: gets a folder for each run, and sweep.json.
      say: called with each line of progress.

    Returns:
      What sweep.json holds, best first: per run its folder's name, its values of the keys that
      vary, and the validation metrics of its best validation by `evaluation.select_by` (or loss).
    """
    runs = combinations(config, overrides)
    results: list[dict[str, Any]] = []
    prepared: dict[tuple, TrainingData] = {}
    for number, (name, values, one) in enumerate(runs, start=1):
        say(f"run {number} of {len(runs)}: {name}")
        key = needed_data(one)
        if key not in prepared:
            prepared = {key: training_data(one)}  # one dataset is held at a time
        train(one, out / name, prepared[key])
        results.append({"run": name, **values, **best_validation(one, out / name)})
        results.sort(key=lambda result: _worth(one, result), reverse=True)
        write_json(out / "sweep.json", results)
    return results


def combinations(
    config: str | Path, overrides: Sequence[str]
) -> list[tuple[str, dict[str, str], Config]]:
    """Name, values of the keys that vary, and config of every run; all of them are checked."""
    fixed, varied = [], {}
    for text in overrides:
        key, equals, written = text.partition("=")
        values = split_values(written)
        if equals and len(values) > 1:
            varied[key] = values
        else:
            fixed.append(text)
    if not varied:
        raise UserError(
            "nothing varies; expected a key with several values, such as seed=0,1,2 (a value that "
            "has commas itself stands in brackets)"
        )
    if "evaluation.select_by" in varied:
        raise UserError("evaluation.select_by says which run is best; expected one value of it")
    chosen = list(itertools.islice(itertools.product(*varied.values()), MOST_RUNS + 1))
    if len(chosen) > MOST_RUNS:
        raise UserError(f"more than {MOST_RUNS:,} combinations; give fewer values")
    last = [key.rpartition(".")[2] for key in varied]
    short = last if len(set(last)) == len(last) else list(varied)
    runs = []
    for values in chosen:
        own = [f"{key}={value}" for key, value in zip(varied, values, strict=True)]
        name = ",".join(f"{key}={value}" for key, value in zip(short, values, strict=True))
        loaded = load_config(config, [*fixed, *own])
        safe = re.sub(r"[^\w=.,+-]+", "_", name)
        runs.append((safe, dict(zip(varied, values, strict=True)), loaded))
    names = [name for name, _, _ in runs]
    for name in names:
        if names.count(name) > 1 or len(name) > 200:
            raise UserError(f"values that make no folder name of their own: {name[:60]}")
    return runs


def split_values(text: str) -> list[str]:
    """Text cut at the commas that stand outside of brackets."""
    pieces, depth = [""], 0
    for character in text:
        depth += (character in "([{") - (character in ")]}")
        if character == "," and depth == 0:
            pieces.append("")
        else:
            pieces[-1] += character
    return [piece for piece in pieces if piece] if len(pieces) > 1 else pieces


def best_validation(config: Config, folder: Path) -> dict[str, float]:
    """Step and metrics of a run's best validation."""
    metric = f"validation/{config.evaluation.select_by or 'loss'}"
    records = [record for record in read_metrics(folder) if metric in record]
    if not records:
        raise UserError(
            f"{folder}: has no {metric}; expected evaluation.every_steps="
            f"{config.evaluation.every_steps} to be at most steps={config.steps}, and a run that "
            "was trained with this evaluation.select_by"
        )
    best = max(records, key=lambda record: _worth(config, record))
    shown = {key: best[key] for key in best if key.startswith("validation/")}
    return {"step": best["step"], **shown}


def _worth(config: Config, record: dict[str, Any]) -> float:
    metric = config.evaluation.select_by or "loss"
    value = record[f"validation/{metric}"]
    return -value if metric == "loss" else value


def describe(results: Sequence[dict[str, Any]]) -> str:
    """The results as a table, best first."""
    columns = [key for key in results[0] if key != "run"]
    lines = [[key.removeprefix("validation/") for key in columns]]
    for result in results:
        cells = (result.get(key, "-") for key in columns)
        lines.append([f"{x:.4f}" if isinstance(x, float) else str(x) for x in cells])
    return "\n".join(aligned(lines))
