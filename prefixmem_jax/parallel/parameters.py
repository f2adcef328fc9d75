"""Dense parameters that say where they lie: logical axes stand beside the shape."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding

from prefixmem_jax.parallel.sharding import spec


def parameter(value: jax.Array, *axes: str | None) -> nnx.Param:
    """A parameter with the logical axis (`parallel.sharding.RULES`) of each of its dimensions.

    Inside `nnx.vmap` (stacked layers) `value` is one layer's.
    """
    if value.ndim != len(axes):
        raise ValueError(f"a parameter of shape {value.shape} declared with axes {axes}")
    return nnx.Param(value, logical_axes=axes)


def normal(rngs: nnx.Rngs, std: float, *sized_axes: tuple[int, str | None]) -> nnx.Param:
    """A parameter drawn from a normal distribution: (size, logical axis) of each dimension."""
    shape = tuple(size for size, _ in sized_axes)
    value = std * jax.random.normal(rngs.params(), shape, jnp.float32)
    return parameter(value, *(axis for _, axis in sized_axes))


def abstract_parameters(model: nnx.Module, mesh: Mesh) -> dict[str, Any]:
    """Nested dicts of `jax.ShapeDtypeStruct` with the shardings that a model's parameters declare.

    Args:
      model: real or abstract (`nnx.eval_shape`).

    Raises:
      ValueError: a parameter that declares no axes; it would silently lie on every device.
    """

    def abstract(path: tuple, variable: nnx.Variable) -> jax.ShapeDtypeStruct:
        axes = variable.get_metadata().get("logical_axes")
        leaf = variable.get_value()
        stacked = leaf.ndim - len(axes or ())
        if axes is None or stacked not in (0, 1):  # layers are stacked along a leading axis
            name = "".join(map(str, path))
            raise ValueError(
                f"parameter {name} of shape {leaf.shape} declares axes {axes}; make it with "
                "parallel.parameters.parameter"
            )
        sharding = NamedSharding(mesh, spec(*(None,) * stacked, *axes))
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    state = nnx.state(model, nnx.Param)
    flat = {path: abstract(path, variable) for path, variable in nnx.to_flat_state(state)}
    return nnx.to_pure_dict(nnx.from_flat_state(flat))
