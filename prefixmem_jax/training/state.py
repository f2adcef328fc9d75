"""Everything that a train step changes."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from prefixmem_jax.memory.fresh_rows import fresh_rows
from prefixmem_jax.model_spec import ModelSpec
from prefixmem_jax.training.optimizers import dense_optimizer, memory_optimizer
from prefixmem_jax.training.trainable import trainable_tree


class TrainState(NamedTuple):
    """The state of training.

    Attributes:
      step: int32 [], updates so far.
      params: dense parameters by part (`llm`, `sid_encoder`, `head`), nested dicts of float32.
      optimizer: optax state of the `params` that learn (`training.trainable`).
      memory: the table's rows, or None without a table.
      memory_optimizer: optax state of `memory`, or None.
      average: moving average of `params`, or None (`OptimizerConfig.average_decay`).
    """

    step: jax.Array
    params: dict[str, Any]
    optimizer: Any
    memory: jax.Array | None
    memory_optimizer: Any
    average: dict[str, Any] | None = None

    @property
    def used_params(self) -> dict[str, Any]:
        """The dense parameters that validation and everything after training use."""
        return self.params if self.average is None else self.average


def init_state(spec: ModelSpec, key: jax.Array) -> TrainState:
    """A fresh state; traceable, the same numbers on any mesh."""
    config = spec.config
    model_key, memory_key = jax.random.split(key)
    params = spec.init_params(model_key)
    memory = memory_state = None
    if spec.table is not None:
        memory = spec.table.init(memory_key)
        memory_state = spec.table.init_optimizer(memory_optimizer(config))
    learning = trainable_tree(params, config)
    optimizer = dense_optimizer(config).init(learning)
    average = None if config.optimizer.average_decay is None else params
    return TrainState(jnp.int32(0), params, optimizer, memory, memory_state, average)


def abstract_state(spec: ModelSpec) -> TrainState:
    """Shapes, dtypes and shardings of the state; no memory is taken."""
    config = spec.config
    shapes = jax.eval_shape(lambda: init_state(spec, jax.random.key(0)))

    everywhere = NamedSharding(spec.mesh, P())

    def placed(leaf: jax.ShapeDtypeStruct, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    def by_row(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        return placed(leaf, spec.row_sharding(leaf))

    # What mirrors a parameter lies as the parameter does; counts are on every device.
    optimizer = optax.tree_map_params(
        dense_optimizer(config),
        lambda leaf, parameter: placed(leaf, parameter.sharding),
        shapes.optimizer,
        trainable_tree(spec.params, config),
        transform_non_params=lambda leaf: placed(leaf, everywhere),
    )
    return TrainState(
        placed(shapes.step, everywhere),
        spec.params,
        optimizer,
        spec.memory,
        jax.tree.map(by_row, shapes.memory_optimizer),
        None if shapes.average is None else spec.params,
    )


def init_sharded(spec: ModelSpec, seed: int, without: Collection[str] = ()) -> TrainState:
    """A fresh state on the mesh; the same numbers on any mesh.

    Args:
      without: parts that come from elsewhere; they are left out, and take no memory here.
    """
    key = jax.random.key(seed)
    state = trace_init(spec, without).lower().compile()(key)
    if not spec.memory_on_host:
        return state
    memory, memory_state = trace_init_on_host(spec, without).lower().compile()(key)
    return state._replace(memory=memory, memory_optimizer=memory_state)


def trace_init(spec: ModelSpec, without: Collection[str] = ()) -> jax.stages.Traced:
    """A fresh state of a key, traced, but for a memory that lies in the host's memory."""

    def keep(state: TrainState) -> TrainState:
        params = {part: tree for part, tree in state.params.items() if part not in without}
        memory = None if "memory" in without else state.memory
        average = None if without else state.average
        if spec.memory_on_host:
            state, memory = state._replace(memory_optimizer=None), None
        return state._replace(params=params, memory=memory, average=average)

    shardings = jax.tree.map(lambda leaf: leaf.sharding, keep(abstract_state(spec)))
    # Traced without the mesh, so that each device computes its own numbers: with it, what has no
    # sharding of its own would first be computed whole on all of them.
    init = jax.jit(lambda key: keep(init_state(spec, key)), out_shardings=shardings)
    return init.trace(jax.eval_shape(lambda: jax.random.key(0)))


def trace_init_on_host(spec: ModelSpec, without: Collection[str] = ()) -> jax.stages.Traced:
    """The memory and its optimizer's state of a key, in the host's memory, traced."""

    def init(key: jax.Array) -> tuple[jax.Array | None, Any]:
        _, memory_key = jax.random.split(key)
        memory, state = fresh_rows(spec.table, memory_optimizer(spec.config), memory_key)
        return None if "memory" in without else memory, state

    abstract = abstract_state(spec)
    memory = None if "memory" in without else abstract.memory
    shardings = jax.tree.map(lambda leaf: leaf.sharding, (memory, abstract.memory_optimizer))
    with jax.set_mesh(spec.mesh):
        traced = jax.jit(init, out_shardings=shardings)
        return traced.trace(jax.eval_shape(lambda: jax.random.key(0)))
