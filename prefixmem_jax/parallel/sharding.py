"""How arrays lie on the mesh: one table of rules from logical axes to mesh axes.

Each parameter declares its logical axes beside its shape (`parallel.parameters`). Dense parameters
are stored sharded over `fsdp` and `tensor` and gathered over `fsdp` where they are used; the batch
is sharded over `data` and `fsdp`; the memory table's rows, and everything with one entry a row,
over every axis.

`einsum` and `constrain` take logical axes, so that models name no mesh axis. Where there is no
explicit mesh (one device without a mesh, or inside `shard_map`, where each device computes on
its own) they do nothing more than the plain operation.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from prefixmem_jax.parallel.mesh import AXES

BATCH_AXES = ("data", "fsdp")
# What remat policies call a product of tokens with a weight.
PRODUCT = "product"

# Mesh axes by logical axis; None stands for a dimension that is not sharded.
RULES = {
    "batch": BATCH_AXES,
    "shared_length": "tensor",  # positions that tensor-parallel devices divide among them
    "heads": "tensor",
    "feed_forward": "tensor",
    "vocabulary": "tensor",
    "stored_model": "fsdp",
    "embedded": "tensor",
    "stored_embedded": ("tensor", "fsdp"),
}


def spec(*logical: str | None) -> P:
    """The partition of an array with these logical axes."""
    return P(*(None if axis is None else RULES[axis] for axis in logical))


def row_spec() -> P:
    """The partition of the memory table: rows over every mesh axis."""
    return P(AXES)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, P(BATCH_AXES))


def _explicit_mesh() -> bool:
    mesh = jax.sharding.get_abstract_mesh()
    return not mesh.empty and all(kind == AxisType.Explicit for kind in mesh.axis_types)


def on_tpus() -> bool:
    """Whether the mesh's devices are TPUs, or without a mesh the default ones."""
    return _device_kind().startswith("tpu")


def on_cpus() -> bool:
    """Whether they are CPUs."""
    return _device_kind() == "cpu"


def on_gpus() -> bool:
    """Whether they are GPUs, which are called by their makers' names."""
    return not (on_tpus() or on_cpus())


def _device_kind() -> str:
    device = jax.sharding.get_abstract_mesh().abstract_device
    return (jax.default_backend() if device is None else device.device_kind).lower()


def constrain(x: jax.Array, *logical: str | None) -> jax.Array:
    """Moves x to the partition of these logical axes."""
    return jax.sharding.reshard(x, spec(*logical)) if _explicit_mesh() else x


def einsum(
    equation: str,
    x: jax.Array,
    weight: jax.Array,
    out: tuple[str | None, ...],
    name: str = PRODUCT,
    **options: Any,
) -> jax.Array:
    """`jnp.einsum` of tokens BS... with a weight; the result, BS... too, has the partition `out`.

    Remat policies know it by its name. Where they are not divided, tokens are one axis:
    contracting two for the weight's gradient, XLA copies both operands on CPUs, which takes as long
    as the products.
    """
    if device_count() > 1:
        y = jnp.einsum(equation, x, weight, out_sharding=spec(*out), **options)
        return checkpoint_name(y, name)
    sharding = spec(out[0], *out[2:]) if _explicit_mesh() else None
    flat = x.reshape(-1, *x.shape[2:])
    y = jnp.einsum(equation.replace("BS", "T"), flat, weight, out_sharding=sharding, **options)
    y = y.reshape(*x.shape[:2], *y.shape[1:], out_sharding=spec(*out) if _explicit_mesh() else None)
    return checkpoint_name(y, name)


def gather_over_fsdp(weight: jax.Array, dtype: str, *logical: str | None) -> jax.Array:
    """A stored weight in the compute dtype, whole but for its logical axes.

    Its gradient goes back by a reduce-scatter over `fsdp` in the compute dtype, and then by an
    all-reduce over `data` of each device's own part in the stored dtype. (Left to itself, the
    compiler all-reduces whole gradients.)
    """
    if not _explicit_mesh():
        return weight.astype(dtype)
    if jax.sharding.get_abstract_mesh().size == 1:
        return constrain(weight.astype(dtype), *logical)
    stored = jax.typeof(weight).sharding.spec
    whole = tuple(_without_fsdp(axes) for axes in stored)
    sharded = [dim for dim in range(len(stored)) if whole[dim] != stored[dim]]
    if not sharded:
        return constrain(weight.astype(dtype), *logical)

    def gather(own: jax.Array) -> jax.Array:
        own = jax.lax.pcast(own, "data", to="reduced").astype(dtype)
        # TPUs reduce-scatter along the first axis; along others they reduce all, and cut.
        first = jnp.moveaxis(own, sharded[0], 0)
        whole = jax.lax.all_gather(first, "fsdp", axis=0, tiled=True, to="reduced")
        return jnp.moveaxis(whole, 0, sharded[0])

    gathered = jax.shard_map(
        gather,
        in_specs=stored,
        out_specs=P(*whole, reduced={"data", "fsdp"}),
    )(weight)
    return constrain_gathered(gathered, *logical)


def constrain_gathered(weight: jax.Array, *logical: str | None) -> jax.Array:
    """Moves what `gather_over_fsdp` gave to the partition of these logical axes."""
    if not _explicit_mesh():
        return weight
    stored, wanted = jax.typeof(weight).sharding.spec, spec(*logical)
    if wanted.partitions == stored.partitions:
        return weight
    return jax.sharding.reshard(weight, P(*wanted, reduced=stored.reduced))


def _without_fsdp(axes: Any) -> Any:
    if isinstance(axes, tuple):
        left = tuple(axis for axis in axes if axis != "fsdp")
        return left[0] if len(left) == 1 else left or None
    return None if axes == "fsdp" else axes


def random_bits(key: jax.Array, shape: tuple[int, ...], *logical: str | None) -> jax.Array:
    """Random uint32, the same on any mesh, with the partition of these logical axes."""
    sharding = spec(*logical) if _explicit_mesh() else None
    return jax.random.bits(key, shape, jnp.uint32, out_sharding=sharding)


def device_count() -> int:
    """Devices that an array is divided over where it lies on the mesh."""
    return jax.sharding.get_abstract_mesh().size if _explicit_mesh() else 1


def over_all_devices(x: jax.Array) -> jax.Array:
    """Moves x so that its first axis, which must divide by the devices, lies over all of them."""
    return jax.sharding.reshard(x, row_spec()) if _explicit_mesh() else x


def length_shares() -> int:
    """Devices that divide positions among them."""
    mesh = jax.sharding.get_abstract_mesh()
    return mesh.shape[RULES["shared_length"]] if _explicit_mesh() else 1


def first_positions(where_BS: jax.Array, most: int, shares: int = 1) -> tuple[jax.Array, jax.Array]:
    """Where in a row a condition holds first: index int32 [B, P]; and whether there, bool [B, P].

    Args:
      most: how many are taken of each of so many equal `shares` of a row; P is that of all. Where
        fewer are found, other positions fill up, so that all of a row differ.
    """
    rows, length = where_BS.shape
    parts = where_BS.reshape(rows, shares, length // shares).astype(jnp.int32)
    found, index = jax.lax.top_k(parts, most)  # of equals, the earlier ones
    index += length // shares * jnp.arange(shares, dtype=index.dtype)[:, None]
    index, found = (constrain(x.reshape(rows, -1), "batch", None) for x in (index, found))
    return index, found > 0


def take_positions(x_BS: jax.Array, index_BP: jax.Array) -> jax.Array:
    """x[b, index[b, p]] for every row b: [B, P, ...]."""

    def taken(x: jax.Array, index: jax.Array) -> jax.Array:
        along = index.reshape(*index.shape, *(1,) * (x.ndim - 2))
        return jnp.take_along_axis(x, along, axis=1)

    if not _explicit_mesh():
        return taken(x_BS, index_BP)
    whole = spec("batch", *(None,) * (x_BS.ndim - 1))
    return jax.shard_map(taken, in_specs=(whole, spec("batch", None)), out_specs=whole)(
        x_BS, index_BP
    )


def put_positions(x_BPD: jax.Array, index_BP: jax.Array, length: int) -> jax.Array:
    """The inverse of `take_positions`: [B, length, D], zero where nothing is put.

    Indices of `length` and more put nothing; those below must differ within a row.
    """

    def put(x: jax.Array, index: jax.Array) -> jax.Array:
        row = jnp.arange(len(x))[:, None]
        nothing = jnp.zeros((len(x), length, x.shape[-1]), x.dtype)
        return nothing.at[row, index].add(x, mode="drop", unique_indices=True)

    if not _explicit_mesh():
        return put(x_BPD, index_BP)
    return jax.shard_map(
        put,
        in_specs=(spec("batch", None, None), spec("batch", None)),
        out_specs=spec("batch", None, None),
    )(x_BPD, index_BP)


def take(table: jax.Array, index: jax.Array, *logical: str | None) -> jax.Array:
    """Rows of a table [n, ...] at index [...], with the partition of these logical axes."""
    sharding = spec(*logical) if _explicit_mesh() else None
    return table.at[index].get(out_sharding=sharding)


def by_heads(
    function: Callable,
    heads: tuple,
    batch: tuple,
    *shared: jax.Array,
    by_head: tuple = (),
    kernel: bool = False,
) -> jax.Array:
    """Runs attention on each device's own part of the batch and heads.

    Args:
      function: of (heads, batch, *by_head, *shared).
      heads: arrays [B, any, heads, size]; batch: arrays [B, any].
      shared: of every device alike; by_head: arrays [heads, any, any].
      kernel: whether it calls a kernel, which does not say what its results vary over.
    """
    if not _explicit_mesh():
        return function(heads, batch, *by_head, *shared)
    per_head, per_batch = spec("batch", None, "heads", None), spec("batch", None)
    also = (*(spec("heads", None, None) for _ in by_head), *(P() for _ in shared))
    return jax.shard_map(
        function, in_specs=(per_head, per_batch, *also), out_specs=per_head, check_vma=not kernel
    )(heads, batch, *by_head, *shared)


def by_rows(
    function: Callable, batch: tuple[jax.Array, ...], *shared: Any
) -> tuple[jax.Array, Any]:
    """Runs a function on each device's own rows of the batch.

    Args:
      function: of (*batch, *shared); gives an array with a row for each of the batch's, and sums
        over them, which are added up over the devices.
      batch: arrays [B, ...]; shared: of every device alike.
    """
    if not _explicit_mesh():
        return function(*batch, *shared)

    def local(batch: tuple, shared: tuple) -> tuple[jax.Array, Any]:
        by_row, sums = function(*batch, *shared)
        return by_row, jax.lax.psum(sums, BATCH_AXES)

    return jax.shard_map(local, in_specs=(P(BATCH_AXES), P()), out_specs=(P(BATCH_AXES), P()))(
        batch, shared
    )


def by_vocabulary(
    function: Callable, hidden_BSD: jax.Array, weight_VD: jax.Array, of_batch: tuple
) -> tuple[jax.Array, jax.Array]:
    """Sums a loss over the batch, on each device its own part of the batch and the vocabulary.

    Args:
      function: of (mesh axis that divides the vocabulary or None, hidden states, weight, of_batch);
        gives its part's sum, and something by prediction [B, S]: the same along that axis.
      of_batch: arrays [B, S].
    """
    if not _explicit_mesh():
        return function(None, hidden_BSD, weight_VD, of_batch)
    axis = RULES["vocabulary"]

    def local(hidden: jax.Array, weight: jax.Array, of_batch: tuple) -> tuple:
        hidden = jax.lax.pcast(hidden, axis, to="varying")
        weight = jax.lax.pcast(weight, BATCH_AXES, to="varying")
        loss, by_prediction = function(axis, hidden, weight, of_batch)
        return jax.lax.psum(loss, BATCH_AXES), by_prediction

    return jax.shard_map(
        local,
        in_specs=(
            spec("batch", None, None),
            jax.typeof(weight_VD).sharding.spec,
            spec("batch", None),
        ),
        out_specs=(P(), spec("batch", None)),
    )(hidden_BSD, weight_VD, of_batch)
