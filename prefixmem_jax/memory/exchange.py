"""One device's side of exchanging rows with their owners, inside `shard_map`."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from prefixmem_jax.memory.places import Place, distinct

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


def capacity(addresses: int, density: float, over: int) -> int:
    """Rows that a device may ask of each of `over` owners in one exchange.

    Args:
      addresses: of one device's share of the batch.
      density: expected share of them that name distinct rows.
    """
    even = density * addresses / over
    return min(addresses, math.ceil(CAPACITY_FACTOR * even) + CAPACITY_EXTRA)


class Merged(NamedTuple):
    """Row gradients on their way to the owners: those of the first exchange are there, summed.

    Attributes:
      places, gradients: what each device sends, as in `table.Fetched`: more exchanges may have to
        follow.
      owned: int32, the owner's row numbers, then its number of rows for the padding.
      owned_gradients: float32 [..., width], one sum for each of `owned`.
      sent: int32 [devices * devices], per device and owner how many of its rows went out.
      squared_norm: float32 [], over the summed gradients of all exchanges.
    """

    places: Place
    gradients: jax.Array
    owned: jax.Array
    owned_gradients: jax.Array
    sent: jax.Array
    squared_norm: jax.Array


class Exchange:
    """A device's questions to the owners for its distinct rows, round by round.

    In every round each owner serves, to all devices alike, one range of its rows: from where
    the last round stopped up to the first row that would overflow some device's capacity.
    """

    def __init__(self, places: Place, rows_per_device: int, density: float):
        """Sizes the exchange.

        Args:
          places: of M rows, ascending and distinct, but for those of none, which come last.
          density: how many of them are expected to be rows, not padding, as a share of the M.
        """
        self.places = places
        self.size = len(places.row)
        self.devices = devices()
        self.rows_per_device = rows_per_device
        self.capacity = capacity(self.size, density, self.devices)
        owners = jnp.arange(self.devices, dtype=jnp.int32)
        self.first, self.last = (
            jnp.searchsorted(places.owner, owners, side=side).astype(jnp.int32)
            for side in ("left", "right")
        )

    def swap(self, x: jax.Array) -> jax.Array:
        """[devices * capacity, ...] by owner to the same by asking device, or back."""
        return jax.lax.all_to_all(x, axes(), 0, 0, tiled=True)

    def all_sent(self, start: jax.Array) -> jax.Array:
        """1 where no device has anything left to ask, the same on all: int32 []."""
        return jax.lax.pmin(jnp.all(start >= self.last).astype(jnp.int32), axes())

    def ask(self, start: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
        """One round of questions.

        Returns:
          asked: the owner's own rows that devices ask for, [devices * capacity].
          slots: indices into `places` that this device asked for, [devices * capacity].
          stop: where the next round starts, [devices].
          finished: 1 where this was the last round.
        """
        beyond = self.places.row.at[start + self.capacity].get(mode="clip")
        overflows = start + self.capacity < self.last
        limit = jax.lax.pmin(jnp.where(overflows, beyond, self.rows_per_device), axes())
        slots = start[:, None] + jnp.arange(self.capacity, dtype=jnp.int32)
        rows = self.places.row.at[slots].get(mode="clip")
        served = (slots < self.last[:, None]) & (rows < limit[:, None])
        stop = start + jnp.sum(served, axis=1, dtype=jnp.int32)
        asked = self.swap(jnp.where(served, rows, self.rows_per_device).reshape(-1))
        slots = jnp.where(served, slots, self.size).reshape(-1)
        return asked, slots, stop, self.all_sent(stop)

    def gather_gradients(
        self, start: jax.Array, gradients: jax.Array
    ) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
        """One round of gradients to their owners, equal rows summed in float32.

        Returns:
          rows: distinct ones of this device, padded with their number, [devices * capacity].
          merged: their summed gradients, [devices * capacity, width].
          stop, finished: as for `ask`.
        """
        asked, slots, stop, finished = self.ask(start)
        received = self.swap(gradients.at[slots].get(mode="fill", fill_value=0))
        rows, index = distinct(asked, self.rows_per_device, len(asked))
        merged = jax.ops.segment_sum(received, index, num_segments=len(rows))
        return rows, merged, stop, finished

    def each_round(
        self,
        function: Callable[..., Any],
        carry: Any,
        merged: Merged,
        one_loop: bool,
    ) -> Any:
        """What a function makes of a carry, with the rows and gradients of each round in turn.

        Args:
          merged: what the first round brought.
          one_loop: whether the first round is in the loop too that the others need, if there are
            others. What a program writes in two places, the TPU compiler brings from the host's
            memory to the device in between, whole.
        """

        def one_round(loop: tuple) -> tuple:
            carry, here, start, finished, _ = loop
            carry = function(carry, *here)

            def next_round() -> tuple:
                rows, sums, stop, last = self.gather_gradients(start, merged.gradients)
                return (rows, sums), stop, last

            following = jax.lax.cond(finished == 1, lambda: (here, start, finished), next_round)
            return carry, *following, finished

        first = (merged.owned, merged.owned_gradients)
        loop = (carry, first, merged.sent, self.all_sent(merged.sent), jnp.int32(0))
        if not one_loop:
            loop = one_round(loop)
        return jax.lax.while_loop(lambda loop: loop[-1] == 0, one_round, loop)[0]
