"""Reading a Hugging Face folder's weights into sharded arrays: one tensor on the host at a time."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from prefixmem_jax.errors import UserError
from prefixmem_jax.hf.mapping import Architecture, Weight, table_names, weights
from prefixmem_jax.hf.safetensors_files import SafetensorsFolder
from prefixmem_jax.sid_encoders.prefix_memory import PrefixMemoryConfig

DTYPES = ("F64", "F32", "F16", "BF16")  # as safetensors calls them


def load_parts(
    source: SafetensorsFolder,
    model: Architecture,
    abstract: dict[str, Any],
) -> dict[str, Any]:
    """Dense parts of a model: those that `abstract` has.

    Args:
      abstract: by part, nested dicts of `jax.ShapeDtypeStruct` with the folder's own vocabulary and
        the shardings to load into.

    Raises:
      UserError: a tensor is missing, left over, or of another shape; lists them.
    """
    table = weights(model)
    _check(source, model, table, abstract)
    loaded: dict[str, Any] = {}
    for weight in table:
        if weight.path[0] not in abstract:
            continue
        branch = loaded
        for key in weight.path[:-1]:
            branch = branch.setdefault(key, {})
        branch[weight.path[-1]] = _load(source, weight, _at(abstract, weight.path))
    return loaded


def load_rows(
    source: SafetensorsFolder, sid_encoder: PrefixMemoryConfig, abstract: jax.ShapeDtypeStruct
) -> jax.Array:
    """The memory's rows, each device's part read straight from the tables that it is made of.

    Args:
      abstract: of `memory.table.Table.shape`, with the sharding to load into.
    """
    names, tables = table_names(sid_encoder), sid_encoder.tables
    pack = abstract.shape[1] // (sid_encoder.row_width)

    def part(index: tuple[slice, ...]) -> np.ndarray:
        start, stop, _ = index[0].indices(abstract.shape[0])
        first, last = start * pack // tables, -(-stop * pack // tables)
        stored = slice(first, min(last, sid_encoder.rows))
        width = abstract.shape[1] // pack
        rows = np.zeros((last - first, tables, width), abstract.dtype)
        if stored.start < stored.stop:
            for table, name in enumerate(names):
                rows[: stored.stop - first, table] = source.read(name, stored)
        flat = rows.reshape(-1, width)[start * pack - first * tables :][: (stop - start) * pack]
        return flat.reshape(stop - start, abstract.shape[1])

    return jax.make_array_from_callback(abstract.shape, abstract.sharding, part)


def _at(tree: dict[str, Any], path: tuple[str, ...]) -> Any:
    for key in path:
        tree = tree[key]
    return tree


def _check(
    source: SafetensorsFolder,
    model: Architecture,
    table: list[Weight],
    abstract: dict[str, Any],
) -> None:
    expected: dict[str, tuple[int, ...] | None] = {}  # None where the part is not asked for
    for weight in table:
        shape = None
        if weight.path[0] in abstract:
            shape = _at(abstract, weight.path).shape
            shape = weight.hf_shape(shape[1:] if weight.per_layer else shape)
        layers = range(model.decoder.layers) if weight.per_layer else range(1)
        expected |= dict.fromkeys((weight.name.format(layer=n) for n in layers), shape)
    if model.sid_encoder is not None:
        shape = (model.sid_encoder.rows, model.sid_encoder.row_width)
        expected |= dict.fromkeys(table_names(model.sid_encoder), shape)
    # Where embeddings are tied, some files repeat them as a head.
    repeated = {"lm_head.weight", "llm.lm_head.weight"} if model.decoder.tied_embeddings else set()
    names = set(source.files) - repeated
    problems = [f"missing {name}" for name in sorted(expected.keys() - names)]
    problems += [f"unexpected {name}" for name in sorted(names - expected.keys())]
    for name in sorted(expected.keys() & names):
        if not source.holds(name):
            problems.append(f"{name} is not in {source.files[name]}")
            continue
        shape, wanted, dtype = source.shape(name), expected[name], source.dtype(name)
        if dtype not in DTYPES:
            problems.append(f"{name}: dtype {dtype}, expected one of {', '.join(DTYPES)}")
        if wanted is not None and shape != wanted:
            problems.append(f"{name}: shape {shape}, expected {wanted}")
    if problems:
        raise UserError(f"{source.folder}: {len(problems)} tensors do not fit: {_some(problems)}")


def _some(problems: list[str], most: int = 20) -> str:
    shown = "; ".join(problems[:most])
    return shown if len(problems) <= most else f"{shown}; and {len(problems) - most} more"


def _load(source: SafetensorsFolder, weight: Weight, target: jax.ShapeDtypeStruct) -> jax.Array:
    if not weight.per_layer:
        array = weight.to_ours(source.read(weight.name), target.shape)
        return _placed(array, target.dtype, target.sharding)
    mesh, partition = target.sharding.mesh, target.sharding.spec
    layer_sharding = NamedSharding(mesh, P(*partition[1:]))
    with jax.set_mesh(mesh):
        stacked = jax.jit(
            lambda: jnp.zeros(target.shape, target.dtype), out_shardings=target.sharding
        )()
        put = jax.jit(
            lambda stacked, one, layer: stacked.at[layer].set(one),
            donate_argnums=0,
            out_shardings=target.sharding,
        )
        for layer in range(target.shape[0]):
            array = source.read(weight.name.format(layer=layer))
            array = weight.to_ours(array, target.shape[1:])
            stacked = put(stacked, _placed(array, target.dtype, layer_sharding), layer)
            # Or the next layers would be read while these are still held.
            jax.block_until_ready(stacked)
    return stacked


def _placed(array: np.ndarray, dtype: Any, sharding: jax.sharding.Sharding) -> jax.Array:
    return jax.make_array_from_callback(
        array.shape, sharding, lambda index: array[index].astype(dtype, copy=False)
    )
