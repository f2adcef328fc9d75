"""Lines in the host's memory: read and written there, only the batch's cross to the device.

What lies there says so by its type (`jax.typeof(lines).memory_space`), so that nobody is told. The
gather and the scatter run on the host's CPU, where nothing but whole lines moves; all arithmetic is
on the device.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.experimental.compute_on import compute_on

HOST, DEVICE = jax.memory.Space.Host, jax.memory.Space.Device


def is_on_host(lines: jax.Array) -> bool:
    """Whether an array, traced or not, lies in the host's memory."""
    return jax.typeof(lines).memory_space == HOST


def to_host(x: jax.Array) -> jax.Array:
    return jax.device_put(x, HOST)


def take(lines: jax.Array, index: jax.Array) -> jax.Array:
    """Lines [K, ...] at an index int32 [K], on the device; zero where it is out of range."""
    count = lines.shape[0]
    numbers = jax.lax.GatherDimensionNumbers(
        offset_dims=tuple(range(1, lines.ndim)), collapsed_slice_dims=(0,), start_index_map=(0,)
    )
    clipped = to_host(jnp.minimum(index, count - 1)[:, None])
    with compute_on("device_host"):
        taken = jax.lax.gather(
            lines,
            clipped,
            numbers,
            (1, *lines.shape[1:]),
            mode=jax.lax.GatherScatterMode.PROMISE_IN_BOUNDS,
        )
    exists = (index < count).reshape(-1, *(1,) * (lines.ndim - 1))
    return jnp.where(exists, jax.device_put(taken, DEVICE), 0)


def put(lines: jax.Array, index: jax.Array, new: jax.Array) -> jax.Array:
    """The lines with new ones [K, ...] at an index int32 [K]; those out of range are dropped.

    Args:
      lines: donated or carried by a loop, they are written in place.
      index: distinct, but for those out of range.
    """
    numbers = jax.lax.ScatterDimensionNumbers(
        update_window_dims=tuple(range(1, lines.ndim)),
        inserted_window_dims=(0,),
        scatter_dims_to_operand_dims=(0,),
    )
    index, new = to_host(index[:, None]), to_host(new)
    with compute_on("device_host"):
        changed = jax.lax.scatter(
            lines,
            index,
            new,
            numbers,
            unique_indices=True,
            mode=jax.lax.GatherScatterMode.FILL_OR_DROP,
        )
    return to_host(changed)
