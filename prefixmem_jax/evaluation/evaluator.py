"""Evaluating a trained run: teacher-forced accuracy, greedy hit rate, beam-search retrieval."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from tqdm import tqdm

from prefixmem_jax.config import Config, load_config
from prefixmem_jax.data.prepare import PreparedData, fixed_sample, prepare_data
from prefixmem_jax.data.sequences import batches, example_rows, prompt_rows
from prefixmem_jax.decoding.beam_search import beam_search
from prefixmem_jax.errors import UserError
from prefixmem_jax.evaluation.metrics import beam_metrics, groups_of
from prefixmem_jax.files import write_json
from prefixmem_jax.parallel.mesh import make_mesh
from prefixmem_jax.semantic_ids.trie import Trie
from prefixmem_jax.training.checkpoint import Checkpoints
from prefixmem_jax.training.loop import evaluate_rows
from prefixmem_jax.training.metrics import summarize
from prefixmem_jax.training.step import Trainer, TrainState


class Recommendation(NamedTuple):
    """An item, its title and SID, and the log-probability of the SID in the constrained beam."""

    item: int
    title: str | None
    sid: tuple[int, ...]
    score: float


class Recommender:
    """A trained run on one device, ready to evaluate and to recommend."""

    def __init__(self, trainer: Trainer, state: TrainState, data: PreparedData):
        self.trainer = trainer
        self.config = trainer.config
        self.data = data
        self.trie = Trie(data.catalog)
        # On one device, without a mesh.
        self.state = jax.device_put(jax.device_get(state), jax.devices()[0])
        self._evaluate = jax.jit(trainer.evaluation_step)
        self._search = {
            constrained: jax.jit(
                partial(self._beams, constrained=constrained), static_argnames="beams"
            )
            for constrained in (False, True)
        }

    @classmethod
    def load(cls, run: str | Path, data: PreparedData | None = None) -> Recommender:
        """Reads a run's config and newest checkpoint.

        Raises:
          UserError: not a run directory, no checkpoint, or a stage that cannot recommend.
        """
        run = Path(run)
        if not (run / "config.json").is_file():
            raise UserError(f"{run}: not a run directory (it has no config.json)")
        config = load_config(run / "config.json")
        if config.objective != "next_token":
            raise UserError(
                f"{run}: a {config.objective} run has no decoder; name a next_token run"
            )
        data = data or prepare_data(config.data)
        mesh = make_mesh(devices=jax.devices()[:1])
        trainer = Trainer.create(config, data.catalog.space, mesh)
        with Checkpoints(run, trainer) as checkpoints:
            _, state = checkpoints.restore()
        return cls(trainer, state, data)

    def _beams(
        self,
        params: dict,
        memory: jax.Array | None,
        prompts: dict[str, jax.Array],
        *,
        beams: int,
        constrained: bool,
    ) -> tuple[jax.Array, jax.Array]:
        trie = self.trie if constrained else None
        return tuple(beam_search(self.trainer.model(params), memory, prompts, beams, trie))

    def search(
        self, histories: Sequence[np.ndarray], beams: int, constrained: bool, progress: str = ""
    ) -> tuple[np.ndarray, np.ndarray]:
        """The best next SIDs after each history.

        Returns:
          codes int32 [users, beams, levels] and scores float32 [users, beams], best first; see
          `decoding.beam_search.Beams`.
        """
        rows = prompt_rows(self.data.catalog, histories, self.config.data.max_items)
        size = min(self.config.evaluation.batch_size, len(histories))
        pieces = batches(rows, size)
        found = []
        for piece in tqdm(pieces, desc=progress, unit="batch", disable=not progress):
            beams_found = self._search[constrained](
                self.state.params, self.state.memory, piece, beams=beams
            )
            found.append(jax.device_get(beams_found))
        codes = np.concatenate([codes for codes, _ in found])[: len(histories)]
        scores = np.concatenate([scores for _, scores in found])[: len(histories)]
        return codes, scores

    def teacher_forced(self, examples: Sequence, progress: str = "") -> dict[str, float]:
        """`tf_accuracy/level_l`: top-1 over the whole vocabulary given the true prefix."""
        rows = example_rows(self.data.catalog, examples, self.config.data.max_items)
        sums = evaluate_rows(self._evaluate, self.state, rows, 256, lambda batch: batch, progress)
        summary = summarize(sums)
        return {
            f"tf_{name}": value for name, value in summary.items() if name.startswith("accuracy")
        }

    def recommend(self, history: str | Sequence[int], top: int) -> list[Recommendation]:
        """The best next items, best first; items that share a SID follow each other by id.

        Args:
          history: item ids, oldest first, as a sequence or as text `12,55,803`.
          top: how many items; fewer come back where the catalogue has fewer.
        """
        catalog = self.data.catalog
        items = parse_history(history, len(catalog)) if isinstance(history, str) else history
        if top < 1:
            raise UserError(f"--top: expected 1 or more, got {top}")
        codes, scores = self.search([np.asarray(items)], top, constrained=True)
        found = []
        for sid, score in zip(codes[0], scores[0], strict=True):
            if np.isfinite(score):
                for item in catalog.items_of_group(catalog.group(sid)):
                    found.append(
                        Recommendation(
                            int(item), catalog.titles[item], tuple(map(int, sid)), float(score)
                        )
                    )
        return found[:top]


def parse_history(text: str, items: int) -> list[int]:
    """Item ids from `12,55,803`; UserError where one is no item."""
    history = []
    for part in text.split(","):
        if not part.strip().isdigit() or int(part) >= items:
            raise UserError(
                f"--history: {part.strip()!r} is not an item id; expected 0..{items - 1}"
            )
        history.append(int(part))
    return history


def test_examples(config: Config, data: PreparedData) -> tuple[list, list]:
    """All test examples, and the fixed sample of them for retrieval metrics."""
    return data.split.test, fixed_sample(data.split.test, config.evaluation.users)


def evaluate_model(recommender: Recommender, progress: bool = True) -> dict[str, float]:
    """Every metric of a run on its test examples, flat names."""
    config, data = recommender.config, recommender.data
    everyone, sample = test_examples(config, data)
    metrics = recommender.teacher_forced(
        everyone, f"{config.name} teacher-forced" if progress else ""
    )
    histories = [example.history for example in sample]
    targets = np.array([example.target for example in sample])
    for suffix, constrained in (("unconstrained", False), ("constrained", True)):
        label = f"{config.name} {suffix} beam search" if progress else ""
        codes, _ = recommender.search(histories, config.evaluation.beam, constrained, label)
        groups = groups_of(codes, data.catalog)
        metrics |= beam_metrics(groups, targets, data.catalog, suffix)
    greedy, _ = recommender.search(histories, 1, constrained=False)
    metrics["sid_hit_rate"] = float((groups_of(greedy, data.catalog) >= 0).mean())
    return metrics


def evaluate_run(run: Path, users: int | None, beam: int | None) -> tuple[dict[str, Any], int]:
    """Evaluates a run, writes its metrics.json, and returns the metrics and number of levels.

    Args:
      users, beam: in place of the config's `evaluation.users` and `evaluation.beam`.
    """
    recommender = Recommender.load(run)
    changes = {"users": users, "beam": beam}
    for name, value in changes.items():
        if value is not None and value < (name == "beam"):
            raise UserError(f"--{name}: expected {int(name == 'beam')} or more, got {value}")
    options = dataclasses.replace(
        recommender.config.evaluation, **{k: v for k, v in changes.items() if v is not None}
    )
    recommender.config = dataclasses.replace(recommender.config, evaluation=options)
    return write_metrics(run, recommender), recommender.data.catalog.space.levels


def write_metrics(run: Path, recommender: Recommender) -> dict[str, Any]:
    """Evaluates, and writes the metrics, and what they are of, to the run's metrics.json."""
    metrics: dict[str, Any] = evaluate_model(recommender)
    metrics["beam"] = recommender.config.evaluation.beam
    metrics["step"] = int(recommender.state.step)
    metrics["retrieval_users"] = len(test_examples(recommender.config, recommender.data)[1])
    metrics["test_users"] = len(recommender.data.split.test)
    metrics["dataset_sha256"] = recommender.data.dataset.sha256
    metrics["config"] = dataclasses.asdict(recommender.config)
    write_json(run / "metrics.json", metrics)
    return metrics
