"""The train state and the train step, the same for every objective."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from prefixmem_jax.config import Config
from prefixmem_jax.memory import table
from prefixmem_jax.memory.encoder import init_rows
from prefixmem_jax.parallel.sharding import batch_sharding, parameter_spec, row_spec
from prefixmem_jax.semantic_ids.space import SidSpace
from prefixmem_jax.training.objectives import Model, build_model, next_token_sums
from prefixmem_jax.training.optimizers import clip_scale, dense_optimizer, memory_optimizer


class TrainState(NamedTuple):
    """Everything a step changes.

    Attributes:
      params: dense parameters by part (`llm`, `encoder`, `head`), nested dicts of float32.
      optimizer: optax state of `params`.
      memory: the table's rows, or None without an encoder.
      memory_optimizer: optax state of `memory`, or None.
    """

    params: dict[str, Any]
    optimizer: Any
    memory: jax.Array | None
    memory_optimizer: Any


@dataclass(frozen=True)
class Trainer:
    """The functions of one stage, closed over its config, space and mesh."""

    config: Config
    space: SidSpace
    mesh: Mesh
    graphdef: nnx.GraphDef

    @classmethod
    def create(cls, config: Config, space: SidSpace, mesh: Mesh) -> Trainer:
        abstract = nnx.eval_shape(lambda: build_model(config, space, nnx.Rngs(0)))
        return cls(config, space, mesh, nnx.split(abstract, nnx.Param)[0])

    def model(self, params: dict[str, Any]) -> Model:
        return nnx.merge(self.graphdef, nnx.State(params))

    def init(self, key: jax.Array) -> TrainState:
        """A fresh state; traceable, so that `abstract_state` can say its shapes."""
        model_key, memory_key = jax.random.split(key)
        model = build_model(self.config, self.space, nnx.Rngs(model_key))
        params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
        memory = memory_state = None
        if self.config.encoder is not None:
            memory = init_rows(self.config.encoder, memory_key)
            memory_state = memory_optimizer(self.config).init(memory)
        return TrainState(params, dense_optimizer(self.config).init(params), memory, memory_state)

    def abstract_state(self) -> TrainState:
        """Shapes, dtypes and shardings of the state; no memory is taken."""
        shapes = jax.eval_shape(self.init, jax.random.key(0))
        rows = None if shapes.memory is None else shapes.memory.shape[0]

        def placed(leaf: jax.ShapeDtypeStruct, partition: P) -> jax.ShapeDtypeStruct:
            sharding = NamedSharding(self.mesh, partition)
            return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

        def dense(path: tuple, leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
            return placed(leaf, parameter_spec(path, leaf.shape))

        def by_row(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
            per_row = leaf.ndim > 0 and leaf.shape[0] == rows
            return placed(leaf, row_spec() if per_row else P())

        return TrainState(
            jax.tree_util.tree_map_with_path(dense, shapes.params),
            jax.tree_util.tree_map_with_path(dense, shapes.optimizer),
            jax.tree.map(by_row, shapes.memory),
            jax.tree.map(by_row, shapes.memory_optimizer),
        )

    def init_sharded(self, seed: int) -> TrainState:
        """A fresh state on the mesh; the same numbers on any mesh."""
        shardings = jax.tree.map(lambda leaf: leaf.sharding, self.abstract_state())
        with jax.set_mesh(self.mesh):
            return jax.jit(self.init, out_shardings=shardings)(jax.random.key(seed))

    def abstract_batch(self) -> dict[str, jax.ShapeDtypeStruct]:
        data = self.config.data
        sharding = batch_sharding(self.mesh)
        shape = (data.batch_size, data.sequence_length)
        dtypes = {"tokens": jnp.int32, "segment_ids": jnp.int32, "positions": jnp.int32}
        dtypes["loss_mask"] = jnp.float32
        return {
            name: jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)
            for name, dtype in dtypes.items()
        }

    def train_step(
        self, state: TrainState, batch: dict[str, jax.Array]
    ) -> tuple[TrainState, dict[str, jax.Array]]:
        """One update. Gradients are taken of the fetched rows, never of the table."""
        fetched = None
        if state.memory is not None:
            encoder = self.model(state.params).encoder
            addresses = encoder.addresses(batch["tokens"], batch["segment_ids"])
            fetched = table.fetch(state.memory, addresses)

        def mean_loss(params: dict[str, Any], rows: jax.Array | None) -> tuple:
            memory_rows = None if rows is None else table.spread(fetched._replace(rows=rows))
            sums = next_token_sums(self.model(params), batch, memory_rows)
            return sums["loss"] / jnp.maximum(sums["count"], 1), sums

        rows = None if fetched is None else fetched.rows
        (loss, sums), (gradients, row_gradients) = jax.value_and_grad(
            mean_loss, argnums=(0, 1), has_aux=True
        )(state.params, rows)

        squared_norm = optax.tree.norm(gradients, squared=True)
        if fetched is not None:
            merged = table.merge_gradients(state.memory, fetched, row_gradients)
            squared_norm = squared_norm + merged.squared_norm
        scale = clip_scale(squared_norm, self.config.optimizer.clip_norm)

        gradients = jax.tree.map(lambda g: g * scale, gradients)
        updates, optimizer = dense_optimizer(self.config).update(
            gradients, state.optimizer, state.params
        )
        params = optax.apply_updates(state.params, updates)
        memory, memory_state = state.memory, state.memory_optimizer
        metrics = {"loss": loss, "gradient_norm": jnp.sqrt(squared_norm), "sums": sums}
        if fetched is not None:
            memory, memory_state = table.update_rows(
                memory,
                memory_state,
                memory_optimizer(self.config),
                fetched,
                row_gradients,
                merged,
                scale,
            )
            metrics["memory_rounds"] = fetched.rounds
        return TrainState(params, optimizer, memory, memory_state), metrics

    def evaluation_step(
        self, params: dict[str, Any], memory: jax.Array | None, batch: dict[str, jax.Array]
    ) -> dict[str, jax.Array]:
        """Teacher-forced loss and hits on a batch, as sums (`objectives.next_token_sums`)."""
        model = self.model(params)
        memory_rows = None
        if memory is not None:
            addresses = model.encoder.addresses(batch["tokens"], batch["segment_ids"])
            memory_rows = table.read(memory, addresses)
        return next_token_sums(model, batch, memory_rows)

    def compile_train_step(self) -> Callable:
        """The compiled step; it takes over (donates) the state it is given."""
        with jax.set_mesh(self.mesh):
            jitted = jax.jit(self.train_step, donate_argnums=0)
            return jitted.lower(self.abstract_state(), self.abstract_batch()).compile()
