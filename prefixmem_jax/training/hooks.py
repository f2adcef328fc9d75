"""What happens between steps: logging, validation, checkpoints, profiles."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from prefixmem_jax.config import Config
from prefixmem_jax.data.batch import Rows, batches
from prefixmem_jax.data.pipeline import global_batch, rows_of_batch
from prefixmem_jax.errors import UserError
from prefixmem_jax.evaluation.validation import ValidationRetrieval
from prefixmem_jax.model_spec import ModelSpec
from prefixmem_jax.parallel.sharding import batch_sharding
from prefixmem_jax.progress import say
from prefixmem_jax.runs.checkpoint import Checkpoints
from prefixmem_jax.runs.metrics import MetricsWriter
from prefixmem_jax.training.parts import to_parts
from prefixmem_jax.training.state import TrainState
from prefixmem_jax.training.step import validation_step

# Rows of a bad batch that are named.
NAMED = 8
# Share of the time from which on the progress line says that steps wait for data.
WAITED_LONG = 0.05


@dataclass
class Progress:
    """How far a run is.

    Attributes:
      step: updates made; steps: to make; rows: that there are to learn from.
      state, metrics: of the last step, on the devices.
      unchecked: metrics of the steps since the last `check`, by step.
      tokens, flops, seconds: spent on training steps so far, since the run's first.
      memory_overflows: of these steps, those whose exchange of rows needed more than one round.
      input_seconds, saving_seconds: of these, waiting for batches, and held up by checkpoints.
      seconds_at_peak: that a step would take at the devices' peak, nothing computed twice; None
        where their peak is not known.
      best: of the validations so far, the larger the better; None before the first.
      since_best: validations since; patience: how many end the run, 0 for none.
    """

    step: int
    steps: int
    rows: int
    tokens: int = 0
    flops: int = 0
    seconds: float = 0.0
    input_seconds: float = 0.0
    saving_seconds: float = 0.0
    memory_overflows: int = 0
    seconds_at_peak: float | None = None
    best: float | None = None
    since_best: int = 0
    patience: int = 0
    state: TrainState | None = None
    metrics: dict[str, Any] = field(default_factory=dict)
    unchecked: dict[int, dict[str, jax.Array]] = field(default_factory=dict)
    started: float = field(default_factory=time.perf_counter)

    @property
    def done(self) -> bool:
        return self.step >= self.steps or 0 < self.patience <= self.since_best

    @property
    def is_best(self) -> bool:
        """Whether the newest validation was better than all before."""
        return self.best is not None and self.since_best == 0

    def note_step(self, state: TrainState, metrics: dict[str, Any]) -> None:
        """One more; what it gave is looked at later."""
        self.step += 1
        self.state, self.metrics = state, metrics
        looked_at = ("finite", "memory_rounds")
        self.unchecked[self.step] = {name: metrics[name] for name in looked_at if name in metrics}

    def check(self, config: Config) -> None:
        """Looks at the steps since the last call, and waits for them.

        Raises:
          UserError: names the first whose loss or gradients were not finite: it changed no state.
        """
        for step, metrics in jax.device_get(self.unchecked).items():
            if not metrics["finite"]:
                raise not_finite(step, self.rows, config)
            self.memory_overflows += int(metrics.get("memory_rounds", 1) > 1)
        self.unchecked.clear()

    def note_validation(self, value: float) -> None:
        """Whether it is the best so far, and how long ago that was."""
        better = self.best is None or value > self.best
        self.best = value if better else self.best
        self.since_best = 0 if better else self.since_best + 1

    def selection(self, select_by: str | None) -> dict[str, Any]:
        """What a run that goes on from here must know of the validations so far."""
        return {"by": select_by, "best": self.best, "since_best": self.since_best}

    def go_on_selecting(self, selection: dict[str, Any], select_by: str | None) -> None:
        """From a `selection`; one by another metric says nothing of what is best now."""
        if select_by is not None and selection.get("by") == select_by:
            self.best, self.since_best = selection["best"], selection["since_best"]

    def totals(self) -> dict[str, float]:
        """What was spent up to now, by name."""
        now = time.perf_counter()
        self.seconds += now - self.started
        self.started = now
        names = ("tokens", "flops", "seconds", "input_seconds", "saving_seconds")
        return {name: getattr(self, name) for name in (*names, "memory_overflows")}

    @contextmanager
    def timing(self, name: str) -> Iterator[None]:
        """Adds what passes to `input_seconds` or `saving_seconds`."""
        started = time.perf_counter()
        yield
        setattr(self, name, getattr(self, name) + time.perf_counter() - started)

    def skip_time(self) -> None:
        """What passed since `totals` was not training."""
        self.started = time.perf_counter()


def not_finite(step: int, rows: int, config: Config) -> UserError:
    """What a run ends with; it names the step and its batch.

    Args:
      rows: that there are to learn from.
    """
    batch = rows_of_batch(step, rows, config.data.batch_size, config.seed)
    named = ", ".join(map(str, batch[:NAMED]))
    more = f" and {len(batch) - NAMED} more" if len(batch) > NAMED else ""
    return UserError(
        f"step {step}: the loss or its gradient is not finite; the last checkpoint stands; lower "
        f"optimizer.learning_rate (now {config.optimizer.learning_rate}), or look at the batch, "
        f"rows {named}{more}, with `prefixmem data inspect RUN/config.json --batch {step}`"
    )


class Hook:
    """Runs after the steps that it is due at; the last step is always one of them.

    When any hook runs, every step so far was finite.

    Attributes:
      before_stopping: whether it runs too where the loop is asked to end early.
    """

    before_stopping = False

    def __init__(self, every_steps: int):
        self.every_steps = every_steps

    def due(self, progress: Progress) -> bool:
        return progress.done or progress.step % self.every_steps == 0

    def run(self, progress: Progress) -> None:
        raise NotImplementedError

    def close(self) -> None:
        """Runs once after the last step, or where the loop ends early."""


class Logging(Hook):
    """The objective's summary to metrics.jsonl, TensorBoard and the progress bar."""

    def __init__(self, spec: ModelSpec, writer: MetricsWriter | None, bar: tqdm):
        super().__init__(spec.config.log_every_steps)
        self.objective = spec.config.objective
        self.writer, self.bar = writer, bar
        self.before: tuple[int, float, float] | None = None

    def run(self, progress: Progress) -> None:
        metrics = jax.device_get(progress.metrics)  # waits for the step
        totals = progress.totals()
        summary = self.objective.summarize(metrics["sums"])
        record = {**summary, "gradient_norm": float(metrics["gradient_norm"]), **totals}
        for kind in ("gradient", "update"):
            for part, norm in metrics[f"{kind}_norms"].items():
                record[f"{kind}_norm/{part}"] = float(norm)
        stats = jax.local_devices()[0].memory_stats()
        if stats is not None:  # a CPU does not count
            record["device_memory_bytes"] = stats["peak_bytes_in_use"]
        now = progress.step, totals["seconds"], totals["input_seconds"]
        steps, passed, waited = (x - y for x, y in zip(now, self.before or now, strict=True))
        if passed and progress.seconds_at_peak is not None:
            record["mfu"] = steps * progress.seconds_at_peak / passed
        if "memory_rounds" in metrics:
            record["memory_rounds"] = int(metrics["memory_rounds"])
            record["memory_rows"] = int(metrics["memory_rows"])
            if passed:
                record["memory_rows_per_second"] = record["memory_rows"] * steps / passed
        if self.writer:
            self.writer.write(progress.step, record)
        rate = totals["tokens"] / max(totals["seconds"], 1e-9)
        text = f"loss {summary['loss']:.3f}, {rate:,.0f} {self.objective.unit}/s"
        if "mfu" in record:
            text += f", {record['mfu']:.0%} MFU"
        if waited > WAITED_LONG * passed:
            text += f", {waited / passed:.0%} of the time waiting for data"
        self.before = now
        self.bar.set_postfix_str(text, refresh=False)

    def close(self) -> None:
        self.bar.close()
        if self.writer:
            self.writer.close()


class Validation(Hook):
    """The objective's summary of held-out rows; its time is not training time."""

    def __init__(
        self,
        spec: ModelSpec,
        writer: MetricsWriter | None,
        rows: Rows,
        retrieval: ValidationRetrieval | None,
    ):
        super().__init__(spec.config.evaluation.every_steps)
        self.spec, self.writer, self.retrieval = spec, writer, retrieval
        self.batches = batches(rows, spec.config.data.batch_size)
        self.step = jax.jit(partial(validation_step, spec))

    def run(self, progress: Progress) -> None:
        jax.block_until_ready(progress.state)
        totals = progress.totals()
        sums: dict[str, np.ndarray] = {}
        for batch in self.batches:
            used, memory = progress.state.used_params, progress.state.memory
            for name, value in self._sums(used, memory, batch).items():
                sums[name] = sums.get(name, 0) + np.float64(value)
        summary = self.spec.config.objective.summarize(sums, "validation/")
        if self.retrieval is not None:
            retrieved = self.retrieval(progress.state.used_params, progress.state.memory)
            summary |= {f"validation/{name}": value for name, value in retrieved.items()}
        select_by = self.spec.config.evaluation.select_by
        if select_by is not None:
            value = summary[f"validation/{select_by}"]
            progress.note_validation(-value if select_by == "loss" else value)
        if self.writer:
            self.writer.write(progress.step, {**summary, **totals})
            shown = "  ".join(f"{n.partition('/')[2]} {v:.4f}" for n, v in summary.items())
            say(f"{self.spec.config.name}: step {progress.step}: validation {shown}")
            if progress.done and progress.step < progress.steps:
                say(
                    f"{self.spec.config.name}: ends here: no better {select_by} for "
                    f"{progress.patience} validations"
                )
        progress.skip_time()

    def is_finite(self, state: TrainState) -> bool:
        """Whether a state gives the first held-out rows a finite loss, averaged or not."""
        kept = [state.params] if state.average is None else [state.params, state.average]
        sums = [self._sums(params, state.memory, self.batches[0]) for params in kept]
        return all(bool(np.isfinite(one["loss"])) for one in sums)

    def _sums(
        self, params: dict[str, Any], memory: jax.Array | None, batch: Rows
    ) -> dict[str, np.ndarray]:
        # Every process holds the batch, and gives its share of it.
        process, processes = jax.process_index(), jax.process_count()
        own = jax.tree.map(lambda array: array[process::processes], batch)
        placed = global_batch(own, batch_sharding(self.spec.mesh))
        return jax.device_get(self.step(params, memory, placed))


class Checkpointing(Hook):
    """Saves the state, and where the data stands, asynchronously; never a state that is no good.

    Where validation chooses, the best state so far is saved whenever it comes, and kept.

    A finite update may still be too large: what it made of the parameters shows in the next loss.
    """

    before_stopping = True

    def __init__(
        self,
        spec: ModelSpec,
        checkpoints: Checkpoints,
        writer: MetricsWriter | None,
        metadata: Callable[[], dict[str, Any]],
        is_finite: Callable[[TrainState], bool],
    ):
        super().__init__(spec.config.checkpoint.every_steps)
        self.spec, self.checkpoints, self.writer = spec, checkpoints, writer
        self.metadata, self.is_finite = metadata, is_finite

    def due(self, progress: Progress) -> bool:
        return super().due(progress) or self._is_best(progress)

    def _is_best(self, progress: Progress) -> bool:
        validated = progress.done or progress.step % self.spec.config.evaluation.every_steps == 0
        return validated and progress.is_best

    def run(self, progress: Progress) -> None:
        with progress.timing("saving_seconds"):
            if not self.is_finite(progress.state):
                raise not_finite(progress.step, progress.rows, self.spec.config)
        parts = to_parts(self.spec, progress.state)
        metadata = self.metadata() | {
            "totals": progress.totals(),
            "selection": progress.selection(self.spec.config.evaluation.select_by),
        }
        best = progress.best if self._is_best(progress) else None
        with progress.timing("saving_seconds"):
            if self.writer:  # a checkpoint whose records are missing could not be chosen
                self.writer.publish()
            self.checkpoints.save(progress.step, parts, metadata, best)


class Profiling(Hook):
    """Writes an xprof trace of the steps after `first` up to `last` into the run."""

    def __init__(self, folder: Path, first: int, last: int):
        super().__init__(1)
        self.folder, self.first, self.last = folder, first, last
        self.tracing = False

    def due(self, progress: Progress) -> bool:
        return progress.step == self.first or (
            self.tracing and (progress.done or progress.step >= self.last)
        )

    def run(self, progress: Progress) -> None:
        jax.block_until_ready(progress.state)
        if self.tracing:
            self.close()
        elif not progress.done:
            jax.profiler.start_trace(str(self.folder))
            self.tracing = True

    def close(self) -> None:
        if self.tracing:
            jax.profiler.stop_trace()
            self.tracing = False
