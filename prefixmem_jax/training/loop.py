"""The training loop: any stage, any number of processes, killed and resumed at any moment."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from prefixmem_jax.config import Config
from prefixmem_jax.config_files import to_json
from prefixmem_jax.data.pipeline import global_batch, training_batches
from prefixmem_jax.data.prepare import PreparedData, fixed_sample, prepare_data
from prefixmem_jax.data.sequences import Rows, batches, example_rows, pack_training_rows
from prefixmem_jax.errors import UserError
from prefixmem_jax.files import write_text
from prefixmem_jax.parallel.mesh import make_mesh
from prefixmem_jax.parallel.sharding import batch_sharding
from prefixmem_jax.semantic_ids.space import SidSpace
from prefixmem_jax.runs.checkpoint import Checkpoints, has_checkpoint
from prefixmem_jax.training.flops import matmul_flops
from prefixmem_jax.training.initialise import initial_state
from prefixmem_jax.training.metrics import MetricsWriter, summarize
from prefixmem_jax.training.step import Trainer, TrainState


def claim_run(run: Path, config: Config) -> None:
    """Makes the run directory, or checks that its checkpoints belong to the same config.

    Raises:
      UserError: the directory holds a run of another config; names the first differing key.
    """
    path = run / "config.json"
    text = to_json(config)
    if path.exists() and has_checkpoint(run):
        difference = _first_difference(json.loads(path.read_text()), json.loads(text))
        if difference:
            raise UserError(f"{run}: holds a run with another config ({difference}); use --out")
    elif jax.process_index() == 0:
        run.mkdir(parents=True, exist_ok=True)
        write_text(path, text)


def _first_difference(old: Any, new: Any, key: str = "") -> str | None:
    if isinstance(old, dict) and isinstance(new, dict):
        for name in sorted(old.keys() | new.keys()):
            found = _first_difference(old.get(name), new.get(name), f"{key}{name}.")
            if found:
                return found
        return None
    return None if old == new else f"{key[:-1]} is {old} there, {new} here"


def check_mesh(config: Config, space: SidSpace, mesh: jax.sharding.Mesh) -> None:
    """Raises UserError where the config's sizes do not divide over the mesh."""
    data, fsdp, tensor = mesh.devices.shape
    accumulated = config.optimizer.accumulation_steps
    for key, size, parts in (
        ("data.batch_size", config.data.batch_size, data * fsdp * accumulated),
        ("data.sequence_length", config.data.sequence_length, tensor),
        ("model.kv_heads", config.model.kv_heads, tensor),
        ("model.d_ff", config.model.d_ff, tensor),
        ("model.d_model", config.model.d_model, fsdp * tensor),
        ("vocabulary (see data.vocabulary_multiple)", space.vocabulary_size, tensor),
        ("devices of one process", jax.local_device_count(), tensor),
    ):
        if size % parts:
            raise UserError(
                f"mesh data={data} fsdp={fsdp} tensor={tensor}, accumulation_steps={accumulated}: "
                f"{key}={size} does not divide by {parts}"
            )


def train(config: Config, run: Path, data: PreparedData | None = None) -> TrainState:
    """Trains to `config.steps`, resuming from the run's own newest checkpoint if it has one.

    Args:
      run: directory for config.json, metrics.jsonl, tensorboard/ and checkpoints/.
      data: the config's data, where the caller has prepared it already.

    Returns:
      The final state.
    """
    data = data or prepare_data(config.data)
    mesh = make_mesh(config.mesh)
    check_mesh(config, data.catalog.space, mesh)
    trainer = Trainer.create(config, data.catalog.space, mesh)
    packed = pack_training_rows(
        data.catalog,
        data.split.train,
        config.data.sequence_length,
        config.data.max_items,
        config.seed,
    )
    iterator = training_batches(packed, config.data.batch_size, config.seed)
    # What `init` gets wrong is found before the run directory is touched.
    state = None if has_checkpoint(run) else initial_state(trainer, config.init, config.seed)
    claim_run(run, config)
    with Checkpoints(run, trainer, config.checkpoint.keep) as checkpoints:
        step = 0
        if state is None:
            metadata = checkpoints.metadata()
            if metadata["dataset_sha256"] != data.dataset.sha256:
                raise UserError(
                    f"{run}: was trained on other data (dataset sha256 "
                    f"{metadata['dataset_sha256'][:12]}..., now {data.dataset.sha256[:12]}...)"
                )
            iterator.set_state(metadata["data_iterator"])
            step, state = checkpoints.restore()
        if step >= config.steps:
            return state
        validation = fixed_sample(data.split.validation, config.evaluation.validation_examples)
        rows = example_rows(data.catalog, validation, config.data.max_items)
        with jax.set_mesh(mesh):
            loop = _Loop(trainer, run, checkpoints, rows, data.dataset.sha256, step)
            return loop.run(state, iterator)


class _Loop:
    def __init__(
        self,
        trainer: Trainer,
        run: Path,
        checkpoints: Checkpoints,
        validation: Rows,
        dataset_sha256: str,
        step: int,
    ):
        self.trainer = trainer
        self.config = trainer.config
        self.checkpoints = checkpoints
        self.validation = validation
        self.dataset_sha256 = dataset_sha256
        self.step = step
        self.writer = MetricsWriter(run, step) if jax.process_index() == 0 else None
        # Totals go on from where the last record left them, so that a resumed run's curves do.
        last = self.writer.last if self.writer else {}
        self.totals = {name: last.get(name, 0) for name in ("tokens", "seconds", "flops")}

    def run(self, state: TrainState, iterator: Any) -> TrainState:
        config, sharding = self.config, batch_sharding(self.trainer.mesh)
        flops = matmul_flops(
            self.trainer.train_step, self.trainer.abstract_state(), self.trainer.abstract_batch()
        )
        train_step = self.trainer.compile_train_step()
        evaluate = jax.jit(self.trainer.evaluation_step)
        tokens_per_step = config.data.batch_size * config.data.sequence_length
        bar = tqdm(
            total=config.steps,
            initial=self.step,
            desc=config.name,
            unit="step",
            disable=jax.process_index() != 0,
            dynamic_ncols=True,
        )
        self.started = time.perf_counter()
        while self.step < config.steps:
            batch = global_batch(next(iterator), sharding)
            state, metrics = train_step(state, batch)
            self.step += 1
            done = self.step == config.steps
            self.totals["tokens"] += tokens_per_step
            self.totals["flops"] += flops
            if done or self.step % config.log_every_steps == 0:
                self._log_training(bar, jax.device_get(metrics))
            bar.update()
            if done or self.step % config.evaluation.every_steps == 0:
                self._validate(evaluate, state)
            if done or self.step % config.checkpoint.every_steps == 0:
                metadata = {
                    "data_iterator": iterator.get_state(),
                    "dataset_sha256": self.dataset_sha256,
                }
                self.checkpoints.save(self.step, state, metadata)
        bar.close()
        if self.writer:
            self.writer.close()
        return state

    def _count_seconds(self) -> None:
        now = time.perf_counter()
        self.totals["seconds"] += now - self.started
        self.started = now

    def _log_training(self, bar: tqdm, metrics: dict[str, Any]) -> None:
        self._count_seconds()
        summary = summarize(metrics["sums"])
        if not np.isfinite(summary["loss"]):
            raise UserError(
                f"step {self.step}: the loss is {summary['loss']}; lower optimizer.learning_rate "
                f"(now {self.config.optimizer.learning_rate})"
            )
        record = {**summary, "gradient_norm": float(metrics["gradient_norm"]), **self.totals}
        if "memory_rounds" in metrics:
            record["memory_rounds"] = int(metrics["memory_rounds"])
        if self.writer:
            self.writer.write(self.step, record)
        rate = self.totals["tokens"] / max(self.totals["seconds"], 1e-9)
        bar.set_postfix_str(f"loss {summary['loss']:.3f}, {rate:,.0f} tokens/s", refresh=False)

    def _place(self, batch: Rows) -> dict[str, jax.Array]:
        """This process's part of a batch that every process holds, on the mesh."""
        mesh = self.trainer.mesh
        # Tensor-parallel devices divide the positions of a row: fill them up to a multiple.
        short = -batch["tokens"].shape[1] % mesh.shape["tensor"]
        process, processes = jax.process_index(), jax.process_count()
        local = {
            name: np.pad(array[process::processes], ((0, 0), (0, short)))
            for name, array in batch.items()
        }
        return global_batch(local, batch_sharding(mesh))

    def _validate(self, evaluate: Any, state: TrainState) -> None:
        jax.block_until_ready(state)
        self._count_seconds()
        sums = evaluate_rows(
            evaluate, state, self.validation, self.config.data.batch_size, self._place
        )
        if self.writer:
            self.writer.write(self.step, {**summarize(sums, "validation/"), **self.totals})
        self.started = time.perf_counter()  # validation is not training time


def evaluate_rows(
    evaluate: Any,
    state: TrainState,
    rows: Rows,
    batch_size: int,
    place: Callable[[Rows], Any],
    progress: str = "",
) -> dict[str, np.ndarray]:
    """Sums of `objectives.next_token_sums` over all rows.

    Args:
      evaluate: jitted `Trainer.evaluation_step`.
      rows: the same on every process.
      place: brings a batch to where `evaluate` wants it.
    """
    totals: dict[str, np.ndarray] = {}
    for batch in tqdm(batches(rows, batch_size), desc=progress, unit="batch", disable=not progress):
        sums = evaluate(state.params, state.memory, place(batch))
        for name, value in jax.device_get(sums).items():
            totals[name] = totals.get(name, 0) + np.float64(value)
    return totals
