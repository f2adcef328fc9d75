"""A config's model on a mesh, without a trainer: what it is made of, before any number exists."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from prefixmem_jax.config import Config
from prefixmem_jax.memory.table import Table
from prefixmem_jax.parallel.parameters import abstract_parameters
from prefixmem_jax.parallel.tpu_flags import options_beside_a_host
from prefixmem_jax.semantic_ids.vocabulary import Vocabulary


@dataclass(frozen=True)
class ModelSpec:
    """The model that a config's objective builds; training, inference and export begin here.

    Attributes:
      graphdef: the module without its parameters.
      params: by part (`llm`, `sid_encoder`, `head`, ...), nested dicts of `jax.ShapeDtypeStruct`
        with their shardings.
      table: the memory table that belongs to the SID encoder, or None.
    """

    config: Config
    vocabulary: Vocabulary
    mesh: Mesh
    graphdef: nnx.GraphDef
    params: dict[str, Any]
    table: Table | None

    @classmethod
    def create(cls, config: Config, vocabulary: Vocabulary, mesh: Mesh) -> ModelSpec:
        """Raises UserError where the SID encoder does not fit the SIDs."""
        sid_encoder, table = config.sid_encoder, None
        if sid_encoder is not None:
            sid_encoder.check(vocabulary.space)
            table = sid_encoder.table(vocabulary.space)
        if config.item_head is not None and config.item_head.vectors == "memory":
            sid_encoder.check_items(vocabulary.space)
            table = dataclasses.replace(table, density=1.0)  # of an item all n-grams are read
        abstract = nnx.eval_shape(lambda: _build(config, vocabulary, nnx.Rngs(0)))
        graphdef = nnx.split(abstract, nnx.Param)[0]
        params = abstract_parameters(abstract, mesh)
        return cls(config, vocabulary, mesh, graphdef, params, table)

    def model(self, params: dict[str, Any]) -> nnx.Module:
        """The module with these parameters, by part."""
        return nnx.merge(self.graphdef, nnx.State(params))

    def init_params(self, key: jax.Array) -> dict[str, Any]:
        """Fresh dense parameters; traceable."""
        model = _build(self.config, self.vocabulary, nnx.Rngs(key))
        return nnx.to_pure_dict(nnx.state(model, nnx.Param))

    @property
    def parts(self) -> list[str]:
        """Names of the parts that a checkpoint of this model has."""
        return [*self.params, *([] if self.table is None else ["memory"])]

    @property
    def memory(self) -> jax.ShapeDtypeStruct | None:
        """The memory's rows, abstract."""
        if self.table is None:
            return None
        return jax.ShapeDtypeStruct(
            self.table.shape, jnp.dtype(self.table.dtype), sharding=self.row_sharding(self.table)
        )

    @property
    def memory_on_host(self) -> bool:
        return self.table is not None and self.config.mesh.memory_kind == "pinned_host"

    @property
    def compiler_options(self) -> dict[str, str] | None:
        """Of a train step's compilation."""
        on_tpus = self.mesh.devices.flat[0].platform == "tpu"
        return options_beside_a_host() if on_tpus and self.memory_on_host else None

    def row_sharding(self, leaf: Any) -> NamedSharding:
        """Of the memory's rows, or of a leaf of their optimizer's state."""
        on_host = self.memory_on_host and self.table.is_per_row(leaf)
        kind = "pinned_host" if on_host else None
        return NamedSharding(self.mesh, self.table.partition(leaf), memory_kind=kind)

    def in_loops(self) -> ModelSpec:
        """The same model with its layers in a loop: it compiles sooner, and without gradients it is
        as fast (docs/pods.md).
        """
        model = dataclasses.replace(self.config.model, scan_layers=True)
        if model == self.config.model:
            return self
        config = dataclasses.replace(self.config, model=model)
        return ModelSpec.create(config, self.vocabulary, self.mesh)

    def replicated(self) -> dict[str, Any]:
        """`params` as inference wants them: whole on every device, and weights that the decoder
        casts to its compute dtype wherever it uses them cast once and for all.
        """
        everywhere = NamedSharding(self.mesh, P())

        def wanted(path: tuple, leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
            part, name = path[0].key, path[-1].key
            cast = part in ("llm", "item_head") and name != "scale"  # norms are in float32
            dtype = self.config.model.compute_dtype if cast else leaf.dtype
            return jax.ShapeDtypeStruct(leaf.shape, jnp.dtype(dtype), sharding=everywhere)

        return jax.tree_util.tree_map_with_path(wanted, self.params)


def _build(config: Config, vocabulary: Vocabulary, rngs: nnx.Rngs) -> nnx.Module:
    return config.objective.build_model(config, vocabulary, rngs)
