"""`prefixmem evaluate`: runs and heuristics evaluated on the same users, side by side."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax

from prefixmem_jax.config_groups import EvaluationConfig
from prefixmem_jax.data.prepare import PreparedData
from prefixmem_jax.data.transitions import Transitions, needed
from prefixmem_jax.errors import UserError
from prefixmem_jax.evaluation.evaluator import chosen_examples, evaluate_run, load_scores
from prefixmem_jax.evaluation.heuristics import (
    evaluate_scorer,
    item_knn_heuristic,
    optimum,
    popularity_heuristic,
    successor_heuristic,
    transition_heuristic,
    tuned_transitions,
)
from prefixmem_jax.evaluation.lists import blend, check_share, list_scores, load_lists
from prefixmem_jax.evaluation.metrics import Evaluated, over_users
from prefixmem_jax.evaluation.report import Results, write_comparison
from prefixmem_jax.evaluation.statistics import compare, means
from prefixmem_jax.files import write_json
from prefixmem_jax.runs.run import Run
from prefixmem_jax.storage import absolute, make_folder


def evaluate_heuristics(
    data: PreparedData,
    options: EvaluationConfig,
    split: str = "test",
    transitions: Transitions | None = None,
) -> dict[str, Evaluated]:
    """The heuristics, and for synthetic data the optimum, on the users that `options` chooses.

    Args:
      transitions: `tuned_transitions` of the data, where a run has them.
    """
    examples, sample = chosen_examples(options, data, split)
    if transitions is None:
        transitions = tuned_transitions(data, options.exclude_seen)
    makers = {
        "heuristic_popularity": popularity_heuristic,
        "heuristic_successor": successor_heuristic,
        "heuristic_transition": partial(transition_heuristic, transitions=transitions),
        "heuristic_item_knn": partial(item_knn_heuristic, exclude_seen=options.exclude_seen),
    }
    if data.process is not None:
        makers["optimum"] = optimum
    return {
        name: evaluate_scorer(make(data), data, examples, sample, options, name)
        for name, make in makers.items()
    }


def evaluate_runs(
    runs: Sequence[Path],
    data: str | None = None,
    split: str = "test",
    users: int | None = None,
    beam: int | None = None,
    include_seen: bool = False,
    item_share: float | None = None,
    transition_share: float | None = None,
    heuristics: bool = False,
    blends: Sequence[float] = (),
    out: Path | None = None,
    step: int | str | None = None,
) -> tuple[Results, dict[str, Any], int]:
    """Evaluates runs, writes each one's metrics.json and scores.npz, and compares them.

    With several processes all of them call alike; the first writes. Nothing is evaluated before it
    is known that the runs' numbers can stand side by side.

    Args:
      data: dataset folder in place of each run's own, with the same catalogue.
      users, beam, item_share, transition_share: in place of each run's `evaluation.users` and so
        on.
      include_seen: do not leave out what a history holds, whatever the runs' configs say.
      heuristics: evaluate the heuristics too, on the first run's users; of transitions, the run's
        own where it has counted them.
      blends: of two runs: shares of the second run's lists in blends with the first's.
      out: for results.json, comparison.json and plots; None: the run's own folder if it is one.
      step: of the checkpoints to evaluate, see `Run`.

    Returns:
      Metrics by system; paired comparisons of the others with the first run, by system and metric;
      the number of levels.

    Raises:
      UserError: names two runs that have other data, another catalogue or other options.
    """
    for name, value, least in (("users", users, 0), ("beam", beam, 1)):
        if value is not None and value < least:
            raise UserError(f"--{name}: expected {least} or more, got {value}")
    if blends and len(runs) != 2:
        raise UserError(f"--blend: expected two runs, got {len(runs)}")
    for share in blends:
        check_share(share)
    if out is None and len(runs) > 1:
        out = Path("comparison")
    opened = {name: Run(path, step=step) for name, path in zip(_names(runs), runs, strict=True)}
    for run in opened.values():
        run.check_generates()
    shares = {"item_share": item_share, "transition_share": transition_share}
    for name, share in shares.items():
        # By counts alone most SIDs would have no probability.
        below = share is not None and name == "transition_share" and share == 1
        if share is not None and (below or not 0 <= share <= 1):
            option, most = name.replace("_", "-"), "below 1" if below else "1"
            raise UserError(f"--{option}: expected 0 to {most}, got {share}")
    changes: dict[str, Any] = {"users": users, "beam": beam, **shares}
    changes = {key: value for key, value in changes.items() if value is not None}
    if include_seen:
        changes["exclude_seen"] = False
    options = {
        name: dataclasses.replace(run.config.evaluation, **changes) for name, run in opened.items()
    }
    prepared = {name: run.data(data) for name, run in opened.items()}
    base = next(iter(opened))
    for name, run in opened.items():
        _check_comparable(opened, prepared, options, base, name)
        if options[name].transition_share > 0:
            needed(run.transitions)
        _ = run.step  # a checkpoint is missing now, not when the runs before are evaluated
    folder = out or opened[base].path
    make_folder(folder)
    results: Results = {
        name: evaluate_run(run, prepared[name], options[name], split)
        for name, run in opened.items()
    }
    levels = prepared[base].catalog.space.levels
    if jax.process_index():
        return results, {}, levels
    scores = {name: load_scores(run.path) for name, run in opened.items()}
    if heuristics:
        digest = prepared[base].dataset.sha256
        counts = opened[base].transitions
        evaluated_heuristics = evaluate_heuristics(prepared[base], options[base], split, counts)
        for name, evaluated in evaluated_heuristics.items():
            results[name] = {**evaluated.metrics, "dataset_sha256": digest}
            scores[name] = evaluated.scores
    for share in blends:
        first, second = (load_lists(run.path) for run in opened.values())
        examples, _ = chosen_examples(options[base], prepared[base], split)
        blended = list_scores(blend(first, second, share), examples.targets[first.users])
        name = f"blend_{share:g}"
        scores[name] = over_users(blended, first.users, len(examples))
        results[name] = means(scores[name])
    for name in opened:
        if prepared[name].catalog.sha256 != prepared[base].catalog.sha256:
            # Its codes are others: only what it says of items stands beside the rest.
            of_items = [key for key in scores[name] if key.startswith("item_")]
            results[name] = {
                key: value
                for key, value in results[name].items()
                if key in of_items or not isinstance(value, float)
            }
            scores[name] = {key: scores[name][key] for key in of_items}
    paired = {name: compare(scores[base], scores[name]) for name in scores if name != base}
    if out is not None or heuristics:
        write_json(folder / "results.json", results)
        write_json(folder / "comparison.json", {"compared_with": base, "systems": paired})
    write_comparison(folder, results, levels)
    return results, paired, levels


def _check_comparable(
    runs: dict[str, Run],
    prepared: dict[str, PreparedData],
    options: dict[str, EvaluationConfig],
    base: str,
    name: str,
) -> None:
    """Raises UserError where two runs' numbers do not belong in one table."""

    def differ(what: str, first: Any, second: Any, instead: str) -> None:
        if first != second:
            raise UserError(
                f"evaluate: {runs[base].path} and {runs[name].path} cannot be compared: {what} is "
                f"{first} of the one, {second} of the other; {instead}"
            )

    data, others = prepared[base], prepared[name]
    alone = "evaluate each by itself"
    same = f"{alone}, or on the same data with --data DIR"
    if data.dataset.sha256 != others.dataset.sha256:
        sha256 = data.catalog.sha256[:12], others.catalog.sha256[:12]
        differ("the catalogue's sha256", *sha256, alone)
    differ("the dataset's sha256", data.dataset.sha256[:12], others.dataset.sha256[:12], same)
    config, other = runs[base].config.data, runs[name].config.data
    differ("data.split", config.split, other.split, alone)
    if config.split != "leave_two_out":
        differ("data.holdout", config.holdout, other.holdout, alone)
    for key in ("users", "beam"):
        mine, theirs = (getattr(options[run], key) for run in (base, name))
        differ(f"evaluation.{key}", mine, theirs, f"set it for both with --{key} N")
    left_out = [options[run].exclude_seen for run in (base, name)]
    differ("evaluation.exclude_seen", *left_out, "use --include-seen")


def _names(runs: Sequence[Path]) -> list[str]:
    """A short name for each run: its folder's, or its whole path where two are called the same."""
    short = [absolute(run).name for run in runs]
    if len({absolute(run) for run in runs}) < len(runs):
        raise UserError("evaluate: a run is named twice")
    return short if len(set(short)) == len(short) else [str(run) for run in runs]
