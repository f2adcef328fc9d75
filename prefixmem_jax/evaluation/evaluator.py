"""Evaluating a trained run: teacher-forced accuracy, hit rate, beam-search retrieval, by user."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import jax
import numpy as np
from tqdm import tqdm

from prefixmem_jax.config_files import to_json
from prefixmem_jax.config_groups import EvaluationConfig
from prefixmem_jax.data.prepare import PreparedData, fixed_sample
from prefixmem_jax.data.splits import Examples
from prefixmem_jax.evaluation.lists import item_lists, save_lists
from prefixmem_jax.evaluation.metrics import (
    Evaluated,
    Scores,
    beam_scores,
    by_transition,
    catalogue_metrics,
    diversity_scores,
    groups_of,
    over_users,
    prefix_popularity,
    teacher_forced_scores,
)
from prefixmem_jax.evaluation.sid_to_text import title_bleu
from prefixmem_jax.evaluation.statistics import intervals
from prefixmem_jax.files import reading_npz, write_json, write_npz
from prefixmem_jax.inference.engine import Engine
from prefixmem_jax.parallel.mesh import all_agree
from prefixmem_jax.progress import progress_bar
from prefixmem_jax.runs.run import Run
from prefixmem_jax.storage import make_folder, remove_folder

# What is kept of each user until the metrics are made.
NAMES = ("ranks", "unconstrained", "constrained", "constrained_scores", "greedy")
# Users whose beams are kept in memory, and lost where an evaluation is killed.
SHARE = 4096
# Over the users: their targets' ranks; beams without and with the catalogue; greedily.
PASSES = 4


def chosen_examples(
    options: EvaluationConfig, data: PreparedData, split: str = "test"
) -> tuple[Examples, np.ndarray]:
    """All examples of a split, and which of them retrieval is evaluated on: a fixed sample."""
    everyone = getattr(data.split, split)
    return everyone, fixed_sample(len(everyone), options.users)


def evaluate(
    engine: Engine,
    data: PreparedData,
    options: EvaluationConfig,
    split: str = "test",
    name: str = "",
    work: Path | None = None,
    text_model: str | None = None,
) -> Evaluated:
    """Every metric of a model on a split. With several processes all of them call alike.

    Args:
      name: of the run, on the progress bar; without one, none is shown.
      work: folder for what is done already, so that a killed evaluation goes on from there; it is
        removed at the end. The processes of an evaluation share it.
      text_model: Hugging Face folder with the text tokenizer, if there is one.
    """
    catalog = data.catalog
    everyone, sample = chosen_examples(options, data, split)
    in_sample = np.isin(np.arange(len(everyone)), sample)
    shares = []
    with progress_bar(len(everyone), f"{name} evaluated" if name else "", "user") as bar:
        told = _by_user(bar, len(everyone) + (PASSES - 1) * len(sample))
        for start in range(0, len(everyone), SHARE):
            users = np.arange(start, min(start + SHARE, len(everyone)))
            path = None if work is None else work / f"{start}.npz"
            share = None if path is None else _saved_share(path)
            if all_agree(share is not None):
                told(len(users) + (PASSES - 1) * int(in_sample[users].sum()))
            else:
                share = _search(engine, everyone.take(users), in_sample[users], options, told)
                if path is not None and jax.process_index() == 0:
                    make_folder(path.parent)
                    write_npz(path, share)
            shares.append(share)
    results = {key: np.concatenate([share[key] for share in shares]) for key in shares[0]}

    popularity = prefix_popularity(catalog, data.item_counts, everyone.targets)
    scores = teacher_forced_scores(results["ranks"], popularity)
    retrieved: Scores = {}
    chosen, constrained = everyone.take(sample), results["constrained"]
    seen = chosen.histories() if options.exclude_seen else None
    for suffix, left_out in (("unconstrained", None), ("constrained", seen)):
        groups = groups_of(results[suffix], catalog)
        retrieved |= beam_scores(groups, chosen.targets, catalog, suffix, left_out)
    retrieved |= by_transition(retrieved, data.split.followed(chosen))
    retrieved |= diversity_scores(constrained)
    depths = catalog.trie.depths(results["greedy"])
    for level in range(1, catalog.space.levels + 1):
        retrieved[f"prefix_hit_rate/level_{level}"] = (depths >= level).astype(np.float64)
    retrieved["sid_hit_rate"] = (depths == catalog.space.levels).astype(np.float64)
    scores |= over_users(retrieved, sample, len(everyone))
    overall = catalogue_metrics(groups, data.item_counts, catalog)
    bleu = title_bleu(engine, text_model)
    if bleu is not None:
        overall["bleu"] = bleu
    if work is not None and jax.process_index() == 0:
        remove_folder(work)
    lists = item_lists(sample, constrained, results["constrained_scores"], catalog, seen)
    return Evaluated(scores, overall, lists)


def _saved_share(path: Path) -> dict[str, np.ndarray] | None:
    """What an evaluation that was killed had done of these users, if it can be read."""
    try:
        with reading_npz(path) as saved:
            return {name: saved[name] for name in NAMES}
    except (OSError, ValueError, KeyError, EOFError, BadZipFile):
        return None


def _by_user(bar: tqdm, total: int) -> Callable[[int], None]:
    """Moves a bar that counts users, told how many are done of one pass; `total`: of all passes."""
    done = 0

    def told(users: int) -> None:
        nonlocal done
        done += users
        bar.update(bar.total * done // total - bar.n)

    return told


def _search(
    engine: Engine,
    examples: Examples,
    chosen: np.ndarray,
    options: EvaluationConfig,
    told: Callable[[int], None],
) -> dict[str, np.ndarray]:
    """Teacher-forced ranks of all, SIDs of the chosen ones: `PASSES` over the users."""
    histories = examples.take(np.flatnonzero(chosen)).histories()
    results = {"ranks": engine.target_ranks(examples.histories(), examples.targets, told)}
    for suffix, constrained in (("unconstrained", False), ("constrained", True)):
        results[suffix], results[f"{suffix}_scores"] = engine.search(
            histories,
            options.beam,
            constrained,
            told,
            exclude_seen=constrained and options.exclude_seen,
            options=options,
        )
    del results["unconstrained_scores"]
    greedy, _ = engine.search(histories, 1, constrained=False, told=told)
    results["greedy"] = greedy[:, 0]
    return results


def evaluate_run(
    run: Run,
    data: PreparedData,
    options: EvaluationConfig | None = None,
    split: str = "test",
    engine: Engine | None = None,
) -> dict[str, Any]:
    """Evaluates a run and writes RUN/metrics.json, scores.npz (by user) and lists.npz.

    Args:
      options: default: the run's own.
      engine: the run's, where the caller has it already.
    """
    options = options or run.config.evaluation
    about: dict[str, Any] = {
        "split": split,
        "step": run.step,
        "beam": options.beam,
        "users": options.users,
        "exclude_seen": options.exclude_seen,
        "item_share": options.item_share,
        "transition_share": options.transition_share,
        "dataset_sha256": data.dataset.sha256,
        "catalogue_sha256": data.catalog.sha256,
        "learnt_sha256": run.learnt_sha256,
        "config": json.loads(to_json(dataclasses.replace(run.config, evaluation=options))),
    }
    key = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:16]
    first = jax.process_index() == 0
    engine = engine or run.engine(data.catalog)
    evaluated = evaluate(
        engine,
        data,
        options,
        split,
        run.config.name if first else "",
        run.path / "evaluation" / key,
        run.text_model,
    )
    everyone, sample = chosen_examples(options, data, split)
    metrics = evaluated.metrics | {
        "intervals": intervals(evaluated.scores),
        "collisions": "items that share a SID in random order, expected value",
        "retrieval_users": len(sample),
        f"{split}_users": len(everyone),
        **about,
    }
    if first:
        # Last comes what says that all are there, and of the same evaluation.
        (run.path / "metrics.json").unlink(missing_ok=True)
        write_npz(run.path / "scores.npz", evaluated.scores, compressed=True)
        save_lists(run.path, evaluated.lists)
        write_json(run.path / "metrics.json", metrics)
    return metrics


def load_scores(run: Path) -> Scores:
    """What `evaluate_run` wrote, by user."""
    with reading_npz(run / "scores.npz") as saved:
        return dict(saved)
