"""The training loop: any stage, any number of processes, killed and resumed at any moment."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh
from tqdm import tqdm

from prefixmem_jax.config import Config
from prefixmem_jax.data.pipeline import global_batch, training_batches
from prefixmem_jax.data.prepare import TrainingData
from prefixmem_jax.data.transitions import Transitions
from prefixmem_jax.errors import UserError
from prefixmem_jax.evaluation.heuristics import tuned_transitions
from prefixmem_jax.evaluation.validation import ValidationRetrieval
from prefixmem_jax.model_spec import ModelSpec
from prefixmem_jax.parallel.mesh import make_mesh
from prefixmem_jax.parallel.sharding import batch_sharding
from prefixmem_jax.progress import progress_bar
from prefixmem_jax.runs.boards import check_boards
from prefixmem_jax.runs.checkpoint import Checkpoints
from prefixmem_jax.runs.metrics import MetricsWriter
from prefixmem_jax.runs.run import TRANSITIONS, DataDescription, Run
from prefixmem_jax.storage import is_remote
from prefixmem_jax.training.flops import matmul_flops, peak_flops
from prefixmem_jax.training.hooks import (
    Checkpointing,
    Hook,
    Logging,
    Profiling,
    Progress,
    Validation,
)
from prefixmem_jax.training.initialise import first_state
from prefixmem_jax.training.parts import abstract_parts, from_parts
from prefixmem_jax.training.state import TrainState
from prefixmem_jax.training.step import (
    abstract_batch,
    check_mesh,
    flops_once,
    trace_train_step,
)
from prefixmem_jax.training.stopping import stops_between_steps
from prefixmem_jax.training.watchdog import watchdog
from prefixmem_jax.training_rows import training_data, training_source

log = logging.getLogger(__name__)


def train(
    config: Config,
    folder: Path,
    data: TrainingData | None = None,
    profile: tuple[int, int] | None = None,
    transitions: Transitions | None = None,
) -> TrainState:
    """Trains to `config.steps`, resuming from the run's own newest checkpoint if it has one.

    Args:
      folder: for config.json, data.json, metrics.jsonl, tensorboard/ and checkpoints/.
      data: the config's data, where the caller has prepared it already.
      profile: trace the steps after the first up to the second into `folder`/profile.
      transitions: `tuned_transitions` of the data, where the caller has counted them already.

    Returns:
      The final state.
    """
    config.check()
    if profile is not None and is_remote(folder):
        raise UserError(f"{folder}: --profile writes into the run; expected one of this machine")
    check_boards(config)
    run, objective = Run(folder), config.objective
    data = training_data(config) if data is None else data
    mesh = make_mesh(config.mesh)
    source = training_source(config, data)
    saved = run.config.data.batch_size if run.has_checkpoint else None
    config = with_batch_size(config, len(source), mesh, saved)
    check_mesh(config, data.vocabulary, mesh)
    spec = ModelSpec.create(config, data.vocabulary, mesh)
    iterator = training_batches(source, config.data.batch_size, config.seed)
    # What `init` gets wrong is found before the run directory is touched.
    state = None if run.has_checkpoint else first_state(spec, data)
    first = jax.process_index() == 0
    with ExitStack() as stack:
        if first:
            stack.enter_context(run.lock())
        if run.has_checkpoint:  # now that nobody else is at it
            state = None
        run.claim(config, DataDescription.of(data, config.data))
        counts = None
        if config.evaluation.transition_share > 0:
            # Before the first checkpoint nothing says that they are of these data.
            counted = run.transitions if run.has_checkpoint else None
            counts = counted or transitions
            counts = counts or tuned_transitions(data, config.evaluation.exclude_seen)
            if first and counted is None:
                counts.save(folder / TRANSITIONS)
        validation = objective.validation_rows(
            data, config.data, config.evaluation.validation_examples, mesh.shape["tensor"]
        )
        keeping = Checkpoints(folder, config.checkpoint.keep, config.evaluation.select_by)
        checkpoints = stack.enter_context(keeping)
        patience = config.evaluation.patience
        rows = len(source)
        progress = Progress(0, config.steps, rows, patience=patience)
        if state is None:
            step = checkpoints.choose()
            metadata = checkpoints.metadata(step)
            iterator.set_state(metadata["data_iterator"])
            progress = Progress(step, config.steps, rows, patience=patience, **metadata["totals"])
            progress.go_on_selecting(metadata.get("selection", {}), config.evaluation.select_by)
            state = from_parts(checkpoints.load(abstract_parts(spec), spec, step))
        if progress.done:
            return state
        writer = MetricsWriter(folder, progress.step, config) if first else None
        bar = progress_bar(config.steps, config.name, "step", progress.step, shown=first)
        retrieval = None
        if config.evaluation.retrieves:
            retrieval = ValidationRetrieval(spec, data, counts)
        validating = Validation(spec, writer, validation, retrieval)
        hooks: list[Hook] = [
            validating,  # first: what it finds may make this step the last, which all others note
            Logging(spec, writer, bar),
            Checkpointing(
                spec,
                checkpoints,
                writer,
                lambda: {"data_iterator": iterator.get_state()},
                validating.is_finite,
            ),
        ]
        if profile is not None:
            hooks.append(Profiling(folder / "profile", *profile))
        for hook in hooks:
            stack.callback(hook.close)
        stack.enter_context(jax.set_mesh(mesh))
        return run_steps(spec, state, iterator, hooks, progress, bar, run.path)


def with_batch_size(config: Config, rows: int, mesh: Mesh, saved: int | None = None) -> Config:
    """The config, its batch no larger than what there is to learn from.

    Args:
      saved: of the run that goes on.
    """
    data, fsdp, _ = mesh.devices.shape
    least = data * fsdp * config.optimizer.accumulation_steps
    size = rows - rows % least
    if size >= config.data.batch_size or size == 0:
        return config
    if saved is not None and rows // 2 < saved <= rows:
        size = saved  # as another mesh left it
    log.warning(
        f"data.batch_size={config.data.batch_size}: the training data packs into only {rows} rows; "
        f"going on with batches of {size}"
    )
    return replace(config, data=replace(config.data, batch_size=size))


def run_steps(
    spec: ModelSpec,
    state: TrainState,
    iterator: Any,
    hooks: Sequence[Hook],
    progress: Progress,
    bar: tqdm,
    folder: Path,
) -> TrainState:
    """Steps until the last; between them, the hooks that are due.

    Args:
      folder: of the run, where it says what it is at if it hangs.

    Raises:
      Stopped: after the step in which it was asked to; the state is saved first.
    """
    sharding = batch_sharding(spec.mesh)
    tokens = jax.tree.leaves(abstract_batch(spec))[0].size
    traced = trace_train_step(spec)
    flops = matmul_flops(traced.jaxpr)
    if (peak := peak_flops(jax.devices()[0])) is not None:
        progress.seconds_at_peak = flops_once(spec, traced) / (peak * spec.mesh.size)
    compiled = traced.lower().compile(spec.compiler_options)
    progress.skip_time()
    with (
        stops_between_steps() as asked_to_stop,
        watchdog(folder, progress.step) as signs_of_life,
    ):
        while not progress.done:
            with progress.timing("input_seconds"):
                batch = global_batch(next(iterator), sharding)
            state, metrics = compiled(state, batch)
            progress.note_step(state, metrics)
            signs_of_life.note(progress.step)
            progress.tokens += tokens
            progress.flops += flops
            bar.update()
            stop = asked_to_stop(progress.step)
            for hook in hooks:  # what one finds may make the next one due
                if hook.due(progress) or (stop and hook.before_stopping):
                    progress.check(spec.config)
                    hook.run(progress)
                    signs_of_life.note(progress.step)
            if stop and not progress.done:
                raise stop
    return state
