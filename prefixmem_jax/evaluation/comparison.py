"""`prefixmem evaluate`: runs and heuristics evaluated on the same users, side by side."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from prefixmem_jax.config import Config
from prefixmem_jax.config_files import load_config
from prefixmem_jax.data.prepare import PreparedData, data_space, prepare_data
from prefixmem_jax.errors import UserError
from prefixmem_jax.evaluation.evaluator import (
    Evaluated,
    chosen_examples,
    load_scores,
    write_metrics,
)
from prefixmem_jax.evaluation.heuristics import (
    item_knn_heuristic,
    evaluate_scorer,
    optimum,
    popularity_heuristic,
    successor_heuristic,
)
from prefixmem_jax.inference.engine import Recommender
from prefixmem_jax.evaluation.report import Results, write_comparison
from prefixmem_jax.evaluation.statistics import compare
from prefixmem_jax.files import write_json


def evaluate_heuristics(data: PreparedData, config: Config, split: str = "test") -> dict[str, Evaluated]:
    """The heuristics, and for synthetic data the optimum, on the users that `config` chooses."""
    examples, sample = chosen_examples(config, data, split)
    makers = {
        "heuristic_popularity": popularity_heuristic,
        "heuristic_successor": successor_heuristic,
        "heuristic_item_knn": item_knn_heuristic,
    }
    if data.world is not None:
        makers["optimum"] = optimum
    return {
        name: evaluate_scorer(make(data), data, examples, sample, config.evaluation.beam, name)
        for name, make in makers.items()
    }


def evaluate_runs(
    runs: Sequence[Path],
    data: str | None = None,
    split: str = "test",
    users: int | None = None,
    beam: int | None = None,
    heuristics: bool = False,
    out: Path | None = None,
) -> tuple[Results, dict[str, Any], int]:
    """Judges runs, writes each one's metrics.json and scores.npz, and compares them.

    Args:
      data: dataset folder in place of each run's own.
      users, beam: in place of each run's `evaluation.users` and `evaluation.beam`.
      heuristics: judge the heuristics too, on the first run's users.
      out: for results.json, comparison.json and plots; None: the run's own folder if it is one.

    Returns:
      Metrics by system; paired comparisons of the others with the first run, by system and metric,
      where they were evaluated on the same data; the number of levels.
    """
    for name, value, least in (("users", users, 0), ("beam", beam, 1)):
        if value is not None and value < least:
            raise UserError(f"--{name}: expected {least} or more, got {value}")
    if out is None and len(runs) > 1:
        out = Path("comparison")
    names = _names(runs)
    changes = {"users": users, "beam": beam}
    results: Results = {}
    first: tuple[PreparedData, Config] | None = None
    for run, name in zip(runs, names, strict=True):
        recommender = _load(run, data, {k: v for k, v in changes.items() if v is not None})
        results[name] = write_metrics(run, recommender, split)
        first = first or (recommender.data, recommender.config)
    prepared, config = first
    paired: dict[str, Any] = {}
    scores = {name: load_scores(run) for run, name in zip(runs, names, strict=True)}
    if heuristics:
        for name, evaluated in evaluate_heuristics(prepared, config, split).items():
            results[name] = {**evaluated.metrics, "dataset_sha256": prepared.dataset.sha256}
            scores[name] = evaluated.scores
    base = names[0]
    for name in scores:
        same = results[name]["dataset_sha256"] == results[base]["dataset_sha256"]
        if name != base and same:
            paired[name] = compare(scores[base], scores[name])
    folder = out or runs[0]
    folder.mkdir(parents=True, exist_ok=True)
    levels = prepared.catalog.space.levels
    if out is not None or heuristics:
        write_json(folder / "results.json", results)
        write_json(folder / "comparison.json", {"compared_with": base, "systems": paired})
    write_comparison(folder, results, levels)
    return results, paired, levels


def _names(runs: Sequence[Path]) -> list[str]:
    """A short name for each run: its folder's, or its whole path where two are called the same."""
    short = [run.resolve().name for run in runs]
    if len({run.resolve() for run in runs}) < len(runs):
        raise UserError("evaluate: a run is named twice")
    return short if len(set(short)) == len(short) else [str(run) for run in runs]


def _load(run: Path, data: str | None, changes: dict[str, int]) -> Recommender:
    prepared = None
    if data is not None:
        if not (run / "config.json").is_file():
            raise UserError(f"{run}: not a run directory (it has no config.json)")
        own = load_config(run / "config.json").data
        sizes = data_space(own).codebook_sizes
        prepared = prepare_data(dataclasses.replace(own, path=data, codebook_sizes=sizes))
    recommender = Recommender.load(run, prepared)
    options = dataclasses.replace(recommender.config.evaluation, **changes)
    recommender.config = dataclasses.replace(recommender.config, evaluation=options)
    return recommender
