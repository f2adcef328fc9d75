"""The training loop: any stage, any number of processes, killed and resumed at any moment."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import jax
from tqdm import tqdm

from prefixmem_jax.config import Config
from prefixmem_jax.data.pipeline import global_batch, training_batches
from prefixmem_jax.data.prepare import PreparedData, prepare_data
from prefixmem_jax.model_spec import ModelSpec
from prefixmem_jax.parallel.mesh import make_mesh
from prefixmem_jax.parallel.sharding import batch_sharding
from prefixmem_jax.runs.checkpoint import Checkpoints
from prefixmem_jax.runs.run import DataDescription, Run
from prefixmem_jax.training.flops import matmul_flops
from prefixmem_jax.training.hooks import (
    Checkpointing,
    Hook,
    Logging,
    Profiling,
    Progress,
    Validation,
    not_finite,
)
from prefixmem_jax.training.initialise import initial_state
from prefixmem_jax.training.metrics import MetricsWriter
from prefixmem_jax.training.parts import abstract_parts, from_parts
from prefixmem_jax.training.state import TrainState, abstract_state
from prefixmem_jax.training.step import abstract_batch, check_mesh, compile_train_step, train_step


def train(
    config: Config,
    folder: Path,
    data: PreparedData | None = None,
    profile: tuple[int, int] | None = None,
) -> TrainState:
    """Trains to `config.steps`, resuming from the run's own newest checkpoint if it has one.

    Args:
      folder: for config.json, data.json, metrics.jsonl, tensorboard/ and checkpoints/.
      data: the config's data, where the caller has prepared it already.
      profile: trace the steps after the first up to the second into `folder`/profile.

    Returns:
      The final state.
    """
    data, run, objective = data or prepare_data(config.data), Run(folder), config.objective
    mesh = make_mesh(config.mesh)
    check_mesh(config, data.vocabulary, mesh)
    spec = ModelSpec.create(config, data.vocabulary, mesh)
    rows = objective.training_rows(data, config.data, config.seed)
    iterator = training_batches(rows, config.data.batch_size, config.seed)
    # What `init` gets wrong is found before the run directory is touched.
    state = None if run.has_checkpoint else initial_state(spec, config.init, config.seed)
    run.claim(config, DataDescription.of(data))
    validation = objective.validation_rows(
        data, config.data, config.evaluation.validation_examples, mesh.shape["tensor"]
    )
    with ExitStack() as stack:
        checkpoints = stack.enter_context(Checkpoints(folder, config.checkpoint.keep))
        step = 0
        if state is None:
            iterator.set_state(checkpoints.metadata()["data_iterator"])
            step = checkpoints.latest_step
            state = from_parts(checkpoints.load(abstract_parts(spec), spec))
        if step >= config.steps:
            return state
        first = jax.process_index() == 0
        writer = MetricsWriter(folder, step) if first else None
        last = writer.last if writer else {}
        totals = {name: last.get(name, 0) for name in ("tokens", "flops", "seconds")}
        bar = tqdm(
            total=config.steps,
            initial=step,
            desc=config.name,
            unit="step",
            disable=not first,
            dynamic_ncols=True,
        )
        validating = Validation(spec, writer, validation)
        hooks: list[Hook] = [
            Logging(spec, writer, bar),
            validating,
            Checkpointing(
                spec,
                checkpoints,
                lambda: {"data_iterator": iterator.get_state()},
                validating.is_finite,
            ),
        ]
        if profile is not None:
            hooks.append(Profiling(folder / "profile", *profile))
        for hook in hooks:
            stack.callback(hook.close)
        stack.enter_context(jax.set_mesh(mesh))
        return run_steps(spec, state, iterator, hooks, Progress(step, config.steps, **totals), bar)


def run_steps(
    spec: ModelSpec,
    state: TrainState,
    iterator: Any,
    hooks: Sequence[Hook],
    progress: Progress,
    bar: tqdm,
) -> TrainState:
    """Steps until the last; between them, the hooks that are due."""
    sharding, batch_shapes = batch_sharding(spec.mesh), abstract_batch(spec)
    tokens = jax.tree.leaves(batch_shapes)[0].size
    flops = matmul_flops(
        lambda state, batch: train_step(spec, state, batch), abstract_state(spec), batch_shapes
    )
    compiled = compile_train_step(spec)
    unchecked: list[tuple[int, jax.Array]] = []
    progress.skip_time()
    while not progress.done:
        state, metrics = compiled(state, global_batch(next(iterator), sharding))
        progress.step += 1
        progress.tokens += tokens
        progress.flops += flops
        progress.state, progress.metrics = state, metrics
        unchecked.append((progress.step, metrics["finite"]))
        bar.update()
        due = [hook for hook in hooks if hook.due(progress)]
        if due:
            check_finite(unchecked, spec.config)
            for hook in due:
                hook.run(progress)
    return state


def check_finite(steps: list[tuple[int, jax.Array]], config: Config) -> None:
    """Forgets steps whose loss and gradients were finite; a step's state did not change otherwise.

    Raises:
      UserError: names the first that was not. Nothing has been saved since.
    """
    for (step, _), finite in zip(steps, jax.device_get([flag for _, flag in steps]), strict=True):
        if not finite:
            raise not_finite(step, config)
    steps.clear()
