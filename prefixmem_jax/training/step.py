"""The train step, the same for every objective.

An objective gives loss sums of a batch (`objectives.objective`); everything else is here: gradients
of what learns and of the memory's fetched rows, one clipped update of both.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from prefixmem_jax.config import Config
from prefixmem_jax.errors import UserError
from prefixmem_jax.memory.table import Fetched, Lookup, spread
from prefixmem_jax.model_spec import ModelSpec
from prefixmem_jax.parallel.sharding import batch_sharding
from prefixmem_jax.semantic_ids.vocabulary import Vocabulary
from prefixmem_jax.training.flops import kernel_flops, matmul_flops
from prefixmem_jax.training.optimizers import clip_scale, dense_optimizer, memory_optimizer
from prefixmem_jax.training.state import TrainState, abstract_state
from prefixmem_jax.training.trainable import merged_with, only_trainable, trainable_tree

# What the model looks up is drawn by a key that is no piece's: pieces are numbered from 0.
DRAWING = 2**32 - 1
# So is what the objective moves.
MOVING = 2**32 - 2


def abstract_batch(spec: ModelSpec) -> Any:
    """Shapes, dtypes and shardings of a global batch."""
    return spec.config.objective.abstract_batch(spec.config.data, batch_sharding(spec.mesh))


def step_key(seed: int, step: jax.Array) -> jax.Array:
    """The random key of a step: a resumed run and any mesh draw alike."""
    return jax.random.fold_in(jax.random.key(seed), step)


def train_step(
    spec: ModelSpec, state: TrainState, batch: Any
) -> tuple[TrainState, dict[str, jax.Array]]:
    """One update. Gradients are taken of the fetched rows, never of the table.

    Returns:
      The new state: the old one, bit for bit, where loss or gradients are not finite.
      Metrics: `loss`, `gradient_norm`, `gradient_norms` by part, `finite`, the objective's `sums`,
      and with a table `memory_rows` (distinct ones that each device's share of the batch names,
      all together) and `memory_rounds` (exchanges that they needed).
    """
    config, table = spec.config, spec.table
    key = step_key(config.seed, state.step)
    fetched = None
    if table is not None:
        drawing = jax.random.fold_in(key, DRAWING)
        addresses = spec.model(state.params).memory_addresses(batch, drawing)
        fetched = table.fetch(state.memory, addresses)

    sums, (gradients, row_gradients) = _gradients(spec, state.params, fetched, batch, key)
    squared_norm = optax.tree.norm(gradients, squared=True)
    norms = {part: optax.tree.norm(tree) for part, tree in gradients.items()}
    merged = None
    if fetched is not None:
        merged = table.merge(fetched, row_gradients)
        squared_norm = squared_norm + merged.squared_norm
        norms["memory"] = jnp.sqrt(merged.squared_norm)
    loss = sums["loss"] / jnp.maximum(sums["count"], 1)
    finite = jnp.isfinite(squared_norm) & jnp.isfinite(loss)
    scale = clip_scale(squared_norm, config.optimizer.clip_norm)

    params, optimizer, update_norms = _update_dense(spec, state, gradients, scale, finite)
    params, sums = _moved(spec, params, sums, state.step, key, finite)
    memory, memory_state = state.memory, state.memory_optimizer
    metrics = {
        "loss": loss,
        "gradient_norm": jnp.sqrt(squared_norm),
        "gradient_norms": norms,
        "update_norms": update_norms,
        "finite": finite,
        "sums": sums,
    }
    if merged is not None:
        memory, memory_state, squared_update = table.apply(
            memory,
            memory_state,
            merged,
            memory_optimizer(config),
            jnp.where(finite, scale, jnp.nan),
            key,
        )
        update_norms["memory"] = jnp.sqrt(squared_update)
        metrics["memory_rows"] = fetched.count
        metrics["memory_rounds"] = fetched.rounds
    average = _updated_average(config.optimizer.average_decay, state, params, finite)
    step = state.step + finite.astype(jnp.int32)
    return TrainState(step, params, optimizer, memory, memory_state, average), metrics


def _updated_average(
    decay: float | None, state: TrainState, params: dict[str, Any], finite: jax.Array
) -> dict[str, Any] | None:
    if decay is None:
        return None
    # The first steps' parameters are soon forgotten.
    decay = jnp.minimum(decay, (1 + state.step) / (10 + state.step))
    rate = jnp.where(finite, 1 - decay, 0.0)
    return jax.tree.map(lambda old, new: old + rate * (new - old), state.average, params)


@jax.named_scope("moved")
def _moved(
    spec: ModelSpec,
    params: dict[str, Any],
    sums: dict[str, Any],
    step: jax.Array,
    key: jax.Array,
    finite: jax.Array,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The parameters with what the objective moves itself, if the step is finite; what of the sums
    is reported.
    """
    moving = jax.random.fold_in(key, MOVING)
    parts, reported = spec.config.objective.moved(params, sums, step, moving)
    old = {part: params[part] for part in parts}
    moved = jax.tree.map(lambda new, before: jnp.where(finite, new, before), parts, old)
    return {**params, **moved}, reported


@jax.named_scope("optimizer")
def _update_dense(
    spec: ModelSpec, state: TrainState, gradients: Any, scale: jax.Array, finite: jax.Array
) -> tuple[dict[str, Any], Any, dict[str, jax.Array]]:
    """Dense parameters and their optimizer's state after an update, if it is finite; its norms."""
    trainable = spec.config.optimizer.trainable
    gradients = jax.tree.map(lambda g: g * scale, gradients)
    old = trainable_tree(state.params, spec.config)
    updates, optimizer = dense_optimizer(spec.config).update(gradients, state.optimizer, old)
    new = only_trainable(optax.apply_updates(old, updates), old, trainable, spec.vocabulary)
    new, optimizer = jax.tree.map(
        lambda changed, before: jnp.where(finite, changed, before),
        (new, optimizer),
        (old, state.optimizer),
    )
    made = only_trainable(updates, optax.tree.zeros_like(updates), trainable, spec.vocabulary)
    norms = {part: optax.tree.norm(tree) for part, tree in made.items()}
    return merged_with(state.params, new), optimizer, norms


def _gradients(
    spec: ModelSpec, params: dict[str, Any], fetched: Fetched | None, batch: Any, key: jax.Array
) -> tuple[dict[str, jax.Array], tuple]:
    """Sums over the batch; gradients of its mean loss for what learns and for fetched rows."""
    options = spec.config.optimizer

    def summed_loss(learning: dict[str, Any], rows: jax.Array | None, piece: tuple) -> tuple:
        batch, by_position, number = piece
        looked_up = Lookup()
        if rows is not None:
            index = fetched.index._replace(by_position=by_position)
            looked_up = spread(fetched._replace(rows=rows, index=index))
        model = spec.model(merged_with(params, learning))
        # A key of its own: the step's key itself rounds the memory's rows.
        piece_key = jax.random.fold_in(key, number)
        sums = spec.config.objective.loss_sums(model, batch, looked_up, piece_key)
        return sums["loss"], sums

    def one_piece(piece: tuple) -> tuple:
        gradients, sums = jax.grad(summed_loss, argnums=(0, 1), has_aux=True)(learning, rows, piece)
        return sums, gradients

    learning = trainable_tree(params, spec.config)
    rows, index = (None, None) if fetched is None else (fetched.rows, fetched.index.by_position)
    pieces = options.accumulation_steps
    if pieces == 1:
        sums, gradients = one_piece((batch, index, jnp.int32(0)))
    else:
        # Each device keeps its own rows of the batch: piece i takes every pieces-th of them.
        cut = jax.tree.map(lambda x: _cut(x, pieces), (batch, index))
        numbered = (*cut, jnp.arange(pieces, dtype=jnp.int32))
        first = one_piece(jax.tree.map(lambda x: x[0], numbered))
        rest = jax.tree.map(lambda x: x[1:], numbered)
        (sums, gradients), _ = jax.lax.scan(
            lambda total, piece: (jax.tree.map(jnp.add, total, one_piece(piece)), None),
            first,
            rest,
        )
    count = jnp.maximum(sums["count"], 1)
    dense, by_row = jax.tree.map(lambda g: g / count, gradients)
    zeros = jax.tree.map(jnp.zeros_like, dense)
    return sums, (only_trainable(dense, zeros, options.trainable, spec.vocabulary), by_row)


def _cut(x: jax.Array, pieces: int) -> jax.Array:
    """[B, ...] to [pieces, B / pieces, ...], without moving anything between devices."""
    cut = jnp.moveaxis(x.reshape(-1, pieces, *x.shape[1:]), 1, 0)
    return jax.sharding.reshard(cut, P(None, *jax.typeof(x).sharding.spec))


def validation_step(
    spec: ModelSpec, params: dict[str, Any], memory: jax.Array | None, batch: Any
) -> dict[str, jax.Array]:
    """The objective's sums on a batch, on the mesh, without gradients."""
    model = spec.model(params)
    rows = Lookup()
    if spec.table is not None:
        rows = spread(spec.table.fetch(memory, model.memory_addresses(batch)))
    return spec.config.objective.loss_sums(model, batch, rows, None)


def trace_train_step(spec: ModelSpec) -> jax.stages.Traced:
    """The step of (state, batch), traced; it takes over (donates) the state it is given."""
    state, batch = abstract_state(spec), abstract_batch(spec)
    with jax.set_mesh(spec.mesh):
        jitted = jax.jit(lambda state, batch: train_step(spec, state, batch), donate_argnums=0)
        return jitted.trace(state, batch)


def flops_once(spec: ModelSpec, traced: jax.stages.Traced) -> int:
    """FLOPs of matrix products in a step that computes nothing twice (but on CPUs attention);
    without its kernels'.

    Args:
      traced: the spec's step, which computes again what `model.remat` says.
    """
    if spec.config.model.remat != "none":
        model = replace(spec.config.model, remat="none")
        config = replace(spec.config, model=model)
        traced = trace_train_step(ModelSpec.create(config, spec.vocabulary, spec.mesh))
    return matmul_flops(traced.jaxpr) - kernel_flops(traced.jaxpr)


def compile_train_step(spec: ModelSpec) -> jax.stages.Compiled:
    """The step of (state, batch), compiled."""
    with jax.set_mesh(spec.mesh):
        return trace_train_step(spec).lower().compile(spec.compiler_options)


def check_mesh(config: Config, vocabulary: Vocabulary, mesh: Mesh) -> None:
    """Raises UserError where the config's sizes do not divide over the mesh, or are too large."""
    data, fsdp, tensor = mesh.devices.shape
    of_encoder = []
    if config.sid_encoder is not None:
        of_encoder = config.sid_encoder.divided(fsdp, tensor)
        table = config.sid_encoder.table(vocabulary.space)
        if table is not None:
            table.rows_per_device(mesh.size)
    accumulated = config.optimizer.accumulation_steps
    codes_alone = sum(vocabulary.space.codebook_sizes) if config.objective.sids_alone else 0
    has_item_vectors = config.item_head is not None and config.item_head.vectors == "own"
    for key, size, shares in (
        ("data.batch_size", config.data.batch_size, data * fsdp * accumulated),
        ("data.sequence_length", config.data.sequence_length, tensor),
        ("model.kv_heads", config.model.kv_heads, tensor),
        ("model.d_ff", config.model.d_ff, tensor),
        ("model.d_model", config.model.d_model, fsdp * tensor),
        ("vocabulary (see data.vocabulary_multiple)", vocabulary.size, tensor),
        ("codes of all levels, for objective.softmax=sids", codes_alone, tensor),
        (
            "items (see data.vocabulary_multiple)",
            vocabulary.item_outputs if has_item_vectors else 0,
            tensor,
        ),
        *of_encoder,
    ):
        if size % shares:
            raise UserError(
                f"mesh data={data} fsdp={fsdp} tensor={tensor}, accumulation_steps={accumulated}: "
                f"{key}={size} does not divide by {shares}"
            )
    for group in mesh.devices.reshape(-1, tensor):
        if len({device.process_index for device in group}) > 1:
            # Every process gives rows of its own, which these would have to have together.
            raise UserError(
                f"mesh.tensor={tensor}: devices that share a row are on several machines; expected "
                "fewer, whose devices are on one"
            )
