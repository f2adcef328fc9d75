"""Everything that a train step changes."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

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

    def placed(leaf: jax.ShapeDtypeStruct, partition: P) -> jax.ShapeDtypeStruct:
        sharding = NamedSharding(spec.mesh, partition)
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    def by_row(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        return placed(leaf, spec.table.partition(leaf))

    # What mirrors a parameter lies as the parameter does; counts are on every device.
    optimizer = optax.tree_map_params(
        dense_optimizer(config),
        lambda _, parameter: parameter,
        shapes.optimizer,
        trainable_tree(spec.params, config),
        transform_non_params=lambda leaf: placed(leaf, P()),
    )
    return TrainState(
        placed(shapes.step, P()),
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
    return trace_init(spec, without).lower().compile()(jax.random.key(seed))


def trace_init(spec: ModelSpec, without: Collection[str] = ()) -> jax.stages.Traced:
    """`init_sharded` of a key, traced."""

    def keep(state: TrainState) -> TrainState:
        params = {part: tree for part, tree in state.params.items() if part not in without}
        memory = None if "memory" in without else state.memory
        average = None if without else state.average
        return state._replace(params=params, memory=memory, average=average)

    shardings = jax.tree.map(lambda leaf: leaf.sharding, keep(abstract_state(spec)))
    # Traced without the mesh, so that each device computes its own numbers: with it, what has no
    # sharding of its own would first be computed whole on all of them.
    init = jax.jit(lambda key: keep(init_state(spec, key)), out_shardings=shardings)
    return init.trace(jax.eval_shape(lambda: jax.random.key(0)))
