"""Stored weights, whole where they are used; and their gradients back to where they are stored."""

from __future__ import annotations

import functools
import operator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from prefixmem_jax.parallel.sharding import (
    constrain,
    on_explicit_mesh,
    spec,
    sums_on_sparse_cores,
)


class _Places(NamedTuple):
    """Of a weight: where it is stored, where it lies once gathered, which dimension differs; and
    what it is stored and gathered in.
    """

    stored: P
    whole: P
    divided: int
    stored_dtype: str
    dtype: str


def gather_over_fsdp(
    weight: jax.Array, dtype: str, *logical: str | None, exchanged: bool = True
) -> jax.Array:
    """A stored weight in the compute dtype, whole but for its logical axes.

    Args:
      exchanged: how the gradient goes back. Every device sends every other its piece in the compute
        dtype, and sums what it gets in the stored one: a v5e does that beside other work, where it
        does a reduce-scatter alone, and on some pods as an all-reduce of the whole. Without it, and
        on a v6e, whose sparse cores sum: by that reduce-scatter. It is for gradients that no
        product gives too, which would be laid out anew to be cut. Either way an all-reduce over
        `data` follows, of each device's own part in the stored dtype.
    """
    if not on_explicit_mesh():
        return weight.astype(dtype)
    if jax.sharding.get_abstract_mesh().size == 1:
        return constrain(weight.astype(dtype), *logical)
    stored = jax.typeof(weight).sharding.spec
    whole = tuple(_without_fsdp(axes) for axes in stored)
    divided = [dim for dim in range(len(stored)) if whole[dim] != stored[dim]]
    if not divided:
        return constrain(weight.astype(dtype), *logical)
    places = _Places(stored, P(*whole), divided[0], weight.dtype.name, dtype)
    exchanged = exchanged and not sums_on_sparse_cores()
    gathered = (_exchanged if exchanged else _gathered)(places, weight)
    return constrain_gathered(gathered, *logical)


def constrain_gathered(weight: jax.Array, *logical: str | None) -> jax.Array:
    """Moves what `gather_over_fsdp` gave to the partition of these logical axes."""
    if not on_explicit_mesh():
        return weight
    stored, wanted = jax.typeof(weight).sharding.spec, spec(*logical)
    if wanted.partitions == stored.partitions:
        return weight
    return jax.sharding.reshard(weight, P(*wanted, reduced=stored.reduced))


def _gathered(places: _Places, weight: jax.Array) -> jax.Array:
    def gather(own: jax.Array) -> jax.Array:
        own = jax.lax.pcast(own, "data", to="reduced").astype(places.dtype)
        # TPUs reduce-scatter along the first axis; along others they reduce all, and cut.
        first = jnp.moveaxis(own, places.divided, 0)
        whole = jax.lax.all_gather(first, "fsdp", axis=0, tiled=True, to="reduced")
        return jnp.moveaxis(whole, 0, places.divided)

    whole = P(*places.whole, reduced={"data", "fsdp"})
    return jax.shard_map(gather, in_specs=places.stored, out_specs=whole)(weight)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _exchanged(places: _Places, weight: jax.Array) -> jax.Array:
    return _gathered(places, weight)


def _forward(places: _Places, weight: jax.Array) -> tuple[jax.Array, None]:
    return _gathered(places, weight), None


def _backward(places: _Places, kept: None, gradient: jax.Array) -> tuple[jax.Array]:
    def sum_of_pieces(partial: jax.Array) -> jax.Array:
        count = jax.lax.axis_size("fsdp")
        first = jnp.moveaxis(partial, places.divided, 0)
        pieces = first.reshape(count, -1, *first.shape[1:])
        pieces = jax.lax.all_to_all(pieces, "fsdp", 0, 0).astype(places.stored_dtype)
        # By a TPU's compiler this takes less than half of what one sum over an axis does.
        own = functools.reduce(operator.add, list(pieces))
        return jnp.moveaxis(jax.lax.psum(own, "data"), 0, places.divided)

    partial = P(*places.whole, unreduced={"data", "fsdp"})
    # There is no type for "each device's part of a sum" that an all-to-all takes.
    summed = jax.shard_map(
        sum_of_pieces, in_specs=partial, out_specs=places.stored, check_vma=False
    )(gradient)
    return (summed,)


_exchanged.defvjp(_forward, _backward)


def _without_fsdp(axes: Any) -> Any:
    if isinstance(axes, tuple):
        left = tuple(axis for axis in axes if axis != "fsdp")
        return left[0] if len(left) == 1 else left or None
    return None if axes == "fsdp" else axes
