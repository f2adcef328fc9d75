"""The train state and the train step, the same for every objective."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from prefixmem_jax.config import Config, Scope
from prefixmem_jax.sid_encoders.prefix_memory import make_table
from prefixmem_jax.memory.table import Fetched, Table, spread
from prefixmem_jax.parallel.sharding import batch_sharding, parameter_spec
from prefixmem_jax.semantic_ids.space import SidSpace
from prefixmem_jax.objectives.next_token import Model, build_model, next_token_sums
from prefixmem_jax.training.optimizers import clip_scale, dense_optimizer, memory_optimizer
from prefixmem_jax.training.trainable import merged_with, trained_part, trained_values


class TrainState(NamedTuple):
    """Everything a step changes.

    Attributes:
      step: int32 [], updates so far.
      params: dense parameters by part (`llm`, `encoder`, `head`), nested dicts of float32.
      optimizer: optax state of the `params` that are trained (`training.scopes`).
      memory: the table's rows, or None without an encoder.
      memory_optimizer: optax state of `memory`, or None.
    """

    step: jax.Array
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

    @property
    def table(self) -> Table | None:
        encoder = self.config.encoder
        return None if encoder is None else make_table(encoder, self.space)

    @property
    def scope(self) -> Scope:
        return self.config.optimizer.trainable

    def init(self, key: jax.Array) -> TrainState:
        """A fresh state; traceable, so that `abstract_state` can say its shapes."""
        model_key, memory_key = jax.random.split(key)
        model = build_model(self.config, self.space, nnx.Rngs(model_key))
        params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
        memory = memory_state = None
        if self.table is not None:
            memory = self.table.init(memory_key)
            memory_state = self.table.init_optimizer(memory_optimizer(self.config))
        optimizer = dense_optimizer(self.config).init(trained_part(params, self.scope))
        return TrainState(jnp.int32(0), params, optimizer, memory, memory_state)

    def abstract_state(self) -> TrainState:
        """Shapes, dtypes and shardings of the state; no memory is taken."""
        shapes = jax.eval_shape(lambda: self.init(jax.random.key(0)))

        def placed(leaf: jax.ShapeDtypeStruct, partition: P) -> jax.ShapeDtypeStruct:
            sharding = NamedSharding(self.mesh, partition)
            return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

        def dense(path: tuple, leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
            return placed(leaf, parameter_spec(path, leaf.shape))

        def by_row(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
            return placed(leaf, self.table.partition(leaf))

        return TrainState(
            placed(shapes.step, P()),
            jax.tree_util.tree_map_with_path(dense, shapes.params),
            jax.tree_util.tree_map_with_path(dense, shapes.optimizer),
            jax.tree.map(by_row, shapes.memory),
            jax.tree.map(by_row, shapes.memory_optimizer),
        )

    def init_sharded(self, seed: int, without: Collection[str] = ()) -> TrainState:
        """A fresh state on the mesh; the same numbers on any mesh.

        Args:
          without: parts that come from elsewhere; they are left out, and take no memory here.
        """

        def keep(state: TrainState) -> TrainState:
            params = {part: tree for part, tree in state.params.items() if part not in without}
            memory = None if "memory" in without else state.memory
            return state._replace(params=params, memory=memory)

        shardings = jax.tree.map(lambda leaf: leaf.sharding, keep(self.abstract_state()))
        with jax.set_mesh(self.mesh):
            init = jax.jit(lambda key: keep(self.init(key)), out_shardings=shardings)
            return init(jax.random.key(seed))

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
        if self.table is not None:
            encoder = self.model(state.params).encoder
            addresses = encoder.addresses(batch["tokens"], batch["segment_ids"])
            fetched = self.table.fetch(state.memory, addresses)

        sums, (gradients, row_gradients) = self._gradients(state.params, fetched, batch)
        squared_norm = optax.tree.norm(gradients, squared=True)
        if fetched is not None:
            merged = self.table.merge_gradients(fetched, row_gradients)
            squared_norm = squared_norm + merged.squared_norm
        scale = clip_scale(squared_norm, self.config.optimizer.clip_norm)

        with jax.named_scope("optimizer"):
            gradients = jax.tree.map(lambda g: g * scale, gradients)
            old = trained_part(state.params, self.scope)
            updates, optimizer = dense_optimizer(self.config).update(
                gradients, state.optimizer, old
            )
            new = self._trained_values(optax.apply_updates(old, updates), old)
            params = merged_with(state.params, new)
        memory, memory_state = state.memory, state.memory_optimizer
        metrics = {
            "loss": sums["loss"] / jnp.maximum(sums["count"], 1),
            "gradient_norm": jnp.sqrt(squared_norm),
            "sums": sums,
        }
        if fetched is not None:
            memory, memory_state = self.table.update(
                memory,
                memory_state,
                memory_optimizer(self.config),
                fetched,
                row_gradients,
                merged,
                scale,
                jax.random.fold_in(jax.random.key(self.config.seed), state.step),
            )
            metrics["memory_rounds"] = fetched.rounds
        return TrainState(state.step + 1, params, optimizer, memory, memory_state), metrics

    def _gradients(
        self, params: dict[str, Any], fetched: Fetched | None, batch: dict[str, jax.Array]
    ) -> tuple[dict[str, jax.Array], tuple]:
        """Sums over the batch; gradients of its mean loss for what is trained and fetched rows."""

        def summed_loss(trained: dict[str, Any], rows: jax.Array | None, part: tuple) -> tuple:
            batch, place = part
            memory_rows = None
            if rows is not None:
                memory_rows = spread(fetched._replace(rows=rows, place=place))
            model = self.model(merged_with(params, trained))
            sums = next_token_sums(model, batch, memory_rows)
            return sums["loss"], sums

        def one_part(part: tuple) -> tuple:
            gradients, sums = jax.grad(summed_loss, argnums=(0, 1), has_aux=True)(
                trained, rows, part
            )
            return sums, gradients

        trained = trained_part(params, self.scope)
        rows, place = (None, None) if fetched is None else (fetched.rows, fetched.place)
        parts = self.config.optimizer.accumulation_steps
        if parts == 1:
            sums, gradients = one_part((batch, place))
        else:
            # Each device keeps its own rows of the batch: part i takes every parts-th of them.
            cut = jax.tree.map(lambda x: _cut(x, parts), (batch, place))
            first = one_part(jax.tree.map(lambda x: x[0], cut))
            rest = jax.tree.map(lambda x: x[1:], cut)
            (sums, gradients), _ = jax.lax.scan(
                lambda total, part: (jax.tree.map(jnp.add, total, one_part(part)), None),
                first,
                rest,
            )
        count = jnp.maximum(sums["count"], 1)
        dense, by_row = jax.tree.map(lambda g: g / count, gradients)
        return sums, (self._trained_values(dense, jax.tree.map(jnp.zeros_like, dense)), by_row)

    def _trained_values(self, new: dict[str, Any], old: dict[str, Any]) -> dict[str, Any]:
        return trained_values(new, old, self.scope, self.space.text_tokens)

    def evaluation_step(
        self, params: dict[str, Any], memory: jax.Array | None, batch: dict[str, jax.Array]
    ) -> dict[str, jax.Array]:
        """Teacher-forced loss and hits on a batch, as sums (`objectives.next_token_sums`)."""
        model = self.model(params)
        memory_rows = None
        if memory is not None:
            addresses = model.encoder.addresses(batch["tokens"], batch["segment_ids"])
            memory_rows = self.table.read(memory, addresses)
        return next_token_sums(model, batch, memory_rows)

    def compile_train_step(self) -> Callable:
        """The compiled step; it takes over (donates) the state it is given."""
        with jax.set_mesh(self.mesh):
            jitted = jax.jit(self.train_step, donate_argnums=0)
            return jitted.lower(self.abstract_state(), self.abstract_batch()).compile()


def _cut(x: jax.Array, parts: int) -> jax.Array:
    """[B, ...] to [parts, B / parts, ...], without moving anything between devices."""
    cut = jnp.moveaxis(x.reshape(-1, parts, *x.shape[1:]), 1, 0)
    return jax.sharding.reshard(cut, P(None, *jax.typeof(x).sharding.spec))
