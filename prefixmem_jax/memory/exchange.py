"""One device's side of exchanging rows with their owners, inside `shard_map`."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

# Room for an uneven spread of a batch's rows over their owners before a second exchange: a share of
# an even spread's, and some rows, since small numbers vary more.
CAPACITY_FACTOR = 1.25
CAPACITY_EXTRA = 8


def axes() -> tuple[str, ...]:
    """The mesh axes that rows are spread over: all of them."""
    return jax.sharding.get_abstract_mesh().axis_names


def devices() -> int:
    return jax.sharding.get_abstract_mesh().size


def varying(x: jax.Array) -> jax.Array:
    """Marks a constant as differing between devices, as a loop's carry must be told."""
    return jax.lax.pcast(x, axes(), to="varying")


def distinct(addresses: Any, total: int, most: int | None = None) -> tuple[jax.Array, Any]:
    """Ascending distinct non-negative addresses, padded with `total`; and each one's index in them.

    The index of a negative address is out of range, so that nothing is read or added there.

    Args:
      addresses: an array, or a pytree of them; the indices have its form.
      most: how many are distinct at most; None: all of them.
    """
    leaves, form = jax.tree.flatten(addresses)
    flat = jnp.concatenate([jnp.where(x < 0, total, x).reshape(-1) for x in leaves])
    find = {"total": total, "most": flat.size if most is None else min(most, flat.size)}
    ids, index = jax.lax.platform_dependent(
        flat, cpu=partial(_by_search, **find), default=partial(_by_sorting, **find)
    )
    indices = jnp.split(index, np.cumsum([x.size for x in leaves])[:-1])
    by_leaf = (
        jnp.where(x < 0, flat.size, index.reshape(x.shape))
        for x, index in zip(leaves, indices, strict=True)
    )
    return ids, jax.tree.unflatten(form, by_leaf)


def _by_sorting(flat: jax.Array, *, total: int, most: int) -> tuple[jax.Array, jax.Array]:
    ids, index = jnp.unique(flat, return_inverse=True, size=most, fill_value=total)
    return ids.astype(jnp.int32), index.reshape(-1).astype(jnp.int32)


def _by_search(flat: jax.Array, *, total: int, most: int) -> tuple[jax.Array, jax.Array]:
    """Sorts no places along with the addresses, which takes a CPU ten times as long."""
    ascending = jnp.sort(flat)
    new = jnp.concatenate([jnp.ones(1, bool), ascending[1:] != ascending[:-1]])
    slot = jnp.where(new, jnp.cumsum(new) - 1, most)
    ids = jnp.full(most, total, jnp.int32).at[slot].set(ascending, mode="drop", unique_indices=True)
    return ids, jnp.searchsorted(ids, flat).astype(jnp.int32)


def capacity(addresses: int, density: float, over: int) -> int:
    """Rows that a device may ask of each of `over` owners in one exchange.

    Args:
      addresses: of one device's share of the batch.
      density: expected share of them that name distinct rows.
    """
    even = density * addresses / over
    return min(addresses, math.ceil(CAPACITY_FACTOR * even) + CAPACITY_EXTRA)


class Exchange:
    """A device's questions to the owners for its distinct ids, round by round.

    In every round each owner serves, to all devices alike, one range of row ids: from where
    the last round stopped up to the first id that would overflow some device's capacity.
    """

    def __init__(self, ids: jax.Array, rows_per_device: int, density: float):
        """Sizes the exchange.

        Args:
          ids: int32 [M], as from `distinct`.
          density: how many of them are expected to be rows, not padding, as a share of the M.
        """
        self.ids = ids
        self.devices = devices()
        self.rows_per_device = rows_per_device
        self.capacity = capacity(len(ids), density, self.devices)
        owners = jnp.arange(self.devices, dtype=jnp.int32)
        self.owner_end = (owners + 1) * rows_per_device
        self.first = jnp.searchsorted(ids, owners * rows_per_device).astype(jnp.int32)
        self.last = jnp.searchsorted(ids, self.owner_end).astype(jnp.int32)

    def swap(self, x: jax.Array) -> jax.Array:
        """[devices * capacity, ...] by owner to the same by asking device, or back."""
        return jax.lax.all_to_all(x, axes(), 0, 0, tiled=True)

    def all_sent(self, start: jax.Array) -> jax.Array:
        """1 where no device has anything left to ask, the same on all: int32 []."""
        return jax.lax.pmin(jnp.all(start >= self.last).astype(jnp.int32), axes())

    def _window(self, start: jax.Array) -> tuple[jax.Array, jax.Array]:
        beyond = jnp.minimum(start + self.capacity, len(self.ids) - 1)
        overflow = start + self.capacity < self.last
        limit = jax.lax.pmin(jnp.where(overflow, self.ids[beyond], self.owner_end), axes())
        stop = jnp.searchsorted(self.ids, limit).astype(jnp.int32)
        slots = start[:, None] + jnp.arange(self.capacity, dtype=jnp.int32)
        slots = jnp.where(slots < stop[:, None], slots, len(self.ids)).reshape(-1)
        return slots, jnp.maximum(stop, start)

    def ask(self, start: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
        """One round of questions.

        Returns:
          asked: the owner's local rows that devices ask for, [devices * capacity].
          slots: indices into `ids` that this device asked for, [devices * capacity].
          stop: where the next round starts, [devices].
          finished: 1 where this was the last round.
        """
        slots, stop = self._window(start)
        nothing = self.devices * self.rows_per_device
        wanted = self.ids.at[slots].get(mode="fill", fill_value=nothing)
        asked = self.swap(wanted) - jax.lax.axis_index(axes()) * self.rows_per_device
        asked = jnp.where(
            (asked >= 0) & (asked < self.rows_per_device), asked, self.rows_per_device
        )
        return asked, slots, stop, self.all_sent(stop)

    def gather_gradients(
        self, start: jax.Array, gradients: jax.Array
    ) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
        """One round of gradients to their owners, equal rows summed in float32.

        Returns:
          ids: distinct local rows, padded with the number of rows, [devices * capacity].
          merged: their summed gradients, [devices * capacity, width].
          stop, finished: as for `ask`.
        """
        asked, slots, stop, finished = self.ask(start)
        received = self.swap(gradients.at[slots].get(mode="fill", fill_value=0))
        ids, index = distinct(asked, self.rows_per_device)
        merged = jax.ops.segment_sum(received, index, num_segments=len(ids))
        return ids, merged, stop, finished
