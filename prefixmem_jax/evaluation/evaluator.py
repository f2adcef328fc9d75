"""Judging a trained run: teacher-forced accuracy, hit rate, beam-search retrieval, user by user."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from prefixmem_jax.config import Config
from prefixmem_jax.data.prepare import PreparedData, fixed_sample
from prefixmem_jax.data.splits import Example
from prefixmem_jax.evaluation.metrics import (
    Scores,
    beam_scores,
    catalogue_metrics,
    diversity_scores,
    groups_of,
    teacher_forced_scores,
)
from prefixmem_jax.inference.engine import Recommender
from prefixmem_jax.evaluation.sid_to_text import title_bleu
from prefixmem_jax.evaluation.statistics import intervals, means
from prefixmem_jax.files import replacing, write_json

# Users whose beams are kept in memory, and lost where an evaluation is killed.
PART = 4096


@dataclass(frozen=True)
class Evaluated:
    """A system's scores by user (in the order of the split), and what is not a mean over users."""

    scores: Scores
    overall: dict[str, float]

    @property
    def metrics(self) -> dict[str, float]:
        return means(self.scores) | self.overall


def chosen_examples(
    config: Config, data: PreparedData, split: str = "test"
) -> tuple[list[Example], np.ndarray]:
    """All examples of a split, and which of them retrieval is evaluated on: a fixed sample."""
    everyone = getattr(data.split, split)
    sample = fixed_sample(list(range(len(everyone))), config.evaluation.users)
    return everyone, np.array(sample)


def judge(
    recommender: Recommender, split: str = "test", work: Path | None = None, progress: bool = True
) -> Evaluated:
    """Every metric of a run on a split.

    Args:
      work: folder for what is done already, so that a killed evaluation goes on from there; it is
        removed at the end.
    """
    config, data = recommender.config, recommender.data
    catalog = data.catalog
    everyone, sample = chosen_examples(config, data, split)
    in_sample = np.isin(np.arange(len(everyone)), sample)
    parts = []
    starts = range(0, len(everyone), PART)
    for start in tqdm(
        starts, desc=config.name, unit="part", disable=not progress or len(starts) < 2
    ):
        part = slice(start, start + PART)
        path = None if work is None else work / f"{start}.npz"
        if path is not None and path.is_file():
            with np.load(path) as saved:
                found = dict(saved)
        else:
            found = _search_part(recommender, everyone[part], in_sample[part], progress)
            if path is not None:
                path.parent.mkdir(parents=True, exist_ok=True)
                with replacing(path) as beside, beside.open("wb") as file:
                    np.savez(file, **found)
        parts.append(found)
    found = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}

    scores = teacher_forced_scores(found["ranks"], prefix_popularity(data, everyone))
    retrieved: Scores = {}
    targets = np.array([everyone[user].target for user in sample])
    for suffix in ("unconstrained", "constrained"):
        groups = groups_of(found[suffix], catalog)
        retrieved |= beam_scores(groups, targets, catalog, suffix)
    retrieved |= diversity_scores(found["constrained"])
    depths = catalog.trie.depths(found["greedy"])
    for level in range(1, catalog.space.levels + 1):
        retrieved[f"prefix_hit_rate/level_{level}"] = (depths >= level).astype(np.float64)
    retrieved["sid_hit_rate"] = (depths == catalog.space.levels).astype(np.float64)
    scores |= spread(retrieved, sample, len(everyone))
    overall = catalogue_metrics(groups, data.item_counts, catalog)
    written = title_bleu(recommender)
    if written is not None:
        overall["bleu"] = written
    if work is not None:
        shutil.rmtree(work, ignore_errors=True)
    return Evaluated(scores, overall)


def _search_part(
    recommender: Recommender, examples: Sequence[Example], chosen: np.ndarray, progress: bool
) -> dict[str, np.ndarray]:
    """Teacher-forced ranks of all, SIDs of the chosen ones."""
    config = recommender.config

    def label(text: str) -> str:
        return f"{config.name} {text}" if progress else ""

    histories = [examples[user].history for user in np.flatnonzero(chosen)]
    beam = config.evaluation.beam
    found = {"ranks": recommender.target_ranks(examples, label("teacher-forced"))}
    for suffix, constrained in (("unconstrained", False), ("constrained", True)):
        found[suffix], _ = recommender.search(
            histories, beam, constrained, label(f"{suffix} beam search")
        )
    greedy, _ = recommender.search(histories, 1, constrained=False)
    found["greedy"] = greedy[:, 0]
    return found


def spread(scores: Scores, sample: np.ndarray, users: int) -> Scores:
    """Scores of a sample as scores of all users, NaN for the others."""
    found = {name: np.full(users, np.nan) for name in scores}
    for name, values in scores.items():
        found[name][sample] = values
    return found


def prefix_popularity(data: PreparedData, examples: Sequence[Example]) -> np.ndarray:
    """Occurrences in training of items that share all codes but the last with each target."""
    sids = data.catalog.sids[:, :-1]
    _, prefix_of_item = np.unique(sids, axis=0, return_inverse=True)
    counts = np.bincount(prefix_of_item.reshape(-1), data.item_counts)
    return counts[prefix_of_item.reshape(-1)[[example.target for example in examples]]]


def write_metrics(run: Path, recommender: Recommender, split: str = "test") -> dict[str, Any]:
    """Judges a run and writes RUN/metrics.json and RUN/scores.npz (by user, for comparisons)."""
    config, data = recommender.config, recommender.data
    step = int(recommender.state.step)
    about: dict[str, Any] = {
        "split": split,
        "step": step,
        "beam": config.evaluation.beam,
        "users": config.evaluation.users,
        "dataset_sha256": data.dataset.sha256,
        "catalogue_sha256": data.catalog.trie.checksum,
        "config": dataclasses.asdict(config),
    }
    key = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:16]
    evaluated = judge(recommender, split, run / "evaluation" / key)
    everyone, sample = chosen_examples(config, data, split)
    metrics = evaluated.metrics | {
        "intervals": intervals(evaluated.scores),
        "collisions": "items that share a SID in random order, expected value",
        "retrieval_users": len(sample),
        f"{split}_users": len(everyone),
        **about,
    }
    with replacing(run / "scores.npz") as beside, beside.open("wb") as file:
        np.savez_compressed(file, **evaluated.scores)
    write_json(run / "metrics.json", metrics)
    return metrics


def load_scores(run: Path) -> Scores:
    """What `write_metrics` wrote, by user."""
    with np.load(run / "scores.npz") as saved:
        return {name: saved[name] for name in saved.files}
