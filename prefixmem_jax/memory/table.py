"""The memory table: one row-sharded array, fetched and updated only where a batch touches it.

All tables E[n, h] are one array [rows, width], its rows sharded over every mesh axis. A train
step fetches the distinct rows that its batch names, differentiates with respect to those rows
(never the table), merges the gradients of equal rows at their owner in float32, and updates
just these rows in place. Cost does not depend on the number of rows.

On several devices, each device removes its own duplicates first, then asks the owners. Static
shapes need a capacity: a device may ask an owner for at most `capacity` rows in one exchange.
Where a batch needs more, the exchange is repeated over consecutive ranges of row ids, so that
the result is exact for every input and every row is updated exactly once. Hashed addresses are
spread evenly, so one exchange is the rule; `Fetched.rounds` counts them.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import PartitionSpec as P

from prefixmem_jax.parallel.sharding import row_spec, spec

# Rows are padded to a multiple of this, whatever the number of devices, so that a checkpoint
# has one shape everywhere.
ROW_MULTIPLE = 4096
# Room for an uneven spread of a batch's rows over their owners before a second exchange.
CAPACITY_FACTOR = 1.25


class Fetched(NamedTuple):
    """The distinct rows that each device's part of the batch names.

    Attributes:
      ids: int32 [devices * M], per device ascending and distinct, then the table's size.
      rows: float32 [devices * M, width], zero for the padding.
      place: int32, shape of the addresses: index into the device's own part of `rows`.
      rounds: int32 [], exchanges that were needed (1 unless owners were unevenly loaded).
    """

    ids: jax.Array
    rows: jax.Array
    place: jax.Array
    rounds: jax.Array


class Merged(NamedTuple):
    """Row gradients of the first exchange at their owners, equal rows summed.

    Attributes:
      ids: int32, the owner's local row numbers, then its number of rows for the padding.
      gradients: float32 [..., width].
      done: int32 [devices * devices], per device and owner how many of its ids went out.
      squared_norm: float32 [], over the merged gradients of all exchanges.
    """

    ids: jax.Array
    gradients: jax.Array
    done: jax.Array
    squared_norm: jax.Array


def padded_rows(tables: int, rows: int) -> int:
    """Rows of the one array that holds `tables` tables of `rows` rows."""
    return -(-tables * rows // ROW_MULTIPLE) * ROW_MULTIPLE


# A batch's addresses: tensor-parallel devices, which share a part of the batch, divide its
# positions among them, so that no address is asked for twice.
ADDRESSES = spec("batch", "shared_length")


def _axes() -> tuple[str, ...]:
    return jax.sharding.get_abstract_mesh().axis_names


def _devices() -> int:
    return jax.sharding.get_abstract_mesh().size


def lookup(table: jax.Array, addresses: jax.Array) -> jax.Array:
    """Rows [..., width] at addresses [...], zero where the address is negative.

    The plain gather: for one device without a mesh, and the reference for `fetch`.
    """
    index = jnp.where(addresses < 0, table.shape[0], addresses)
    return table.at[index].get(mode="fill", fill_value=0)


def spread(fetched: Fetched) -> jax.Array:
    """Rows at every address of the batch: [..., width], zero where there was no address.

    Its gradient with respect to `fetched.rows` sums over equal addresses of a device.
    """

    def local(rows_MD: jax.Array, place: jax.Array) -> jax.Array:
        return rows_MD.at[place].get(mode="fill", fill_value=0)

    return jax.shard_map(local, in_specs=(row_spec(), ADDRESSES), out_specs=ADDRESSES)(
        fetched.rows, fetched.place
    )


def read(table: jax.Array, addresses: jax.Array) -> jax.Array:
    """Rows at addresses, without gradients to the table: exchanged on a mesh, else gathered."""
    if jax.sharding.get_abstract_mesh().empty:
        return lookup(table, addresses)
    return spread(fetch(table, addresses))


def fetch(table: jax.Array, addresses: jax.Array) -> Fetched:
    """Fetches the distinct rows that a batch names.

    Args:
      table: [rows, width], sharded by `row_spec`.
      addresses: int32 [batch, length, ...]; negative for none. Moved to `ADDRESSES`.
    """
    rows = row_spec()
    return jax.shard_map(
        _fetch_local, in_specs=(rows, ADDRESSES), out_specs=Fetched(rows, rows, ADDRESSES, P())
    )(table, jax.sharding.reshard(addresses, ADDRESSES))


def _fetch_local(table: jax.Array, addresses: jax.Array) -> Fetched:
    total = table.shape[0] * _devices()
    ids, place = _distinct(addresses, total)
    if _devices() == 1:
        rows = table.at[ids].get(mode="fill", fill_value=0, indices_are_sorted=True)
        return Fetched(ids, rows, place, jnp.int32(1))
    exchange = _Exchange(ids, table.shape[0])

    def more(carry: tuple) -> jax.Array:
        return carry[2] == 0

    def one_round(carry: tuple) -> tuple:
        rows, start, _, rounds = carry
        asked, slots, stop, finished = exchange.ask(start)
        found = table.at[asked].get(mode="fill", fill_value=0)
        answered = exchange.swap(found)
        rows = rows.at[slots].set(answered, mode="drop", unique_indices=True)
        return rows, stop, finished, rounds + 1

    empty = _varying(jnp.zeros((len(ids), table.shape[1]), table.dtype))
    start = exchange.first
    rows, _, _, rounds = jax.lax.while_loop(
        more, one_round, (empty, start, jnp.int32(0), jnp.int32(0))
    )
    return Fetched(ids, rows, place, rounds)


def merge_gradients(table: jax.Array, fetched: Fetched, row_gradients: jax.Array) -> Merged:
    """Brings row gradients [devices * M, width] to the owners and sums equal rows (float32)."""
    by_row = row_spec()
    return jax.shard_map(
        _merge_local,
        in_specs=(by_row, by_row, by_row),
        out_specs=Merged(by_row, by_row, by_row, P()),
    )(table, fetched.ids, row_gradients.astype(jnp.float32))


def _merge_local(table: jax.Array, ids: jax.Array, gradients: jax.Array) -> Merged:
    if _devices() == 1:
        squared = jax.lax.psum(jnp.sum(gradients**2), _axes())
        return Merged(ids, gradients, _varying(jnp.zeros(1, jnp.int32)), squared)
    exchange = _Exchange(ids, table.shape[0])
    merged_ids, merged, stop, finished = exchange.gather_gradients(exchange.first, gradients)

    def later_round(carry: tuple) -> tuple:
        start, _, total = carry
        _, merged, stop, finished = exchange.gather_gradients(start, gradients)
        return stop, finished, total + jnp.sum(merged**2)

    _, _, squared = jax.lax.while_loop(
        lambda carry: carry[1] == 0, later_round, (stop, finished, jnp.sum(merged**2))
    )
    return Merged(merged_ids, merged, stop, jax.lax.psum(squared, _axes()))


def update_rows(
    table: jax.Array,
    state: Any,
    optimizer: optax.GradientTransformation,
    fetched: Fetched,
    row_gradients: jax.Array,
    merged: Merged,
    scale: jax.Array,
) -> tuple[jax.Array, Any]:
    """Applies an optax transformation to the rows in the batch and to no others.

    Leaves of the optimizer state with one entry per row are read and written only at these
    rows; the others (step counts) advance once per call. So Adam is *lazy* here: a row's
    moments decay only in the steps that touch it.

    Args:
      table: [rows, width]; donate it and the state to update in place.
      state: `optimizer.init(table)`.
      scale: factor for the gradients (global-norm clipping).

    Returns:
      The new table and optimizer state.
    """
    by_row = row_spec()
    rows = table.shape[0]
    state_spec = jax.tree.map(lambda leaf: by_row if _per_row(leaf, rows) else P(), state)

    def local(table, state, ids, gradients, merged_ids, merged_gradients, done, scale):
        local_rows = table.shape[0]

        def apply(table: jax.Array, per_row: Any, ids: jax.Array, gradients: jax.Array) -> tuple:
            def read(leaf: jax.Array) -> jax.Array:
                return leaf.at[ids].get(mode="fill", fill_value=0)

            def write(leaf: jax.Array, value: jax.Array) -> jax.Array:
                return leaf.at[ids].set(value.astype(leaf.dtype), mode="drop", unique_indices=True)

            before = read(table)
            mixed = jax.tree.map(
                lambda now, old: read(now) if _per_row(now, local_rows) else old, per_row, state
            )
            updates, after = optimizer.update(gradients * scale, mixed, before)
            table = write(table, before + updates)
            per_row = jax.tree.map(
                lambda leaf, new: write(leaf, new) if _per_row(leaf, local_rows) else new,
                per_row,
                after,
            )
            return table, per_row

        table, new_state = apply(table, state, merged_ids, merged_gradients)
        if _devices() == 1:
            return table, new_state
        exchange = _Exchange(ids, local_rows)

        def later_round(carry: tuple) -> tuple:
            table, new_state, start, _ = carry
            more_ids, more, stop, finished = exchange.gather_gradients(start, gradients)
            table, new_state = apply(table, new_state, more_ids, more)
            return table, new_state, stop, finished

        table, new_state, _, _ = jax.lax.while_loop(
            lambda carry: carry[3] == 0,
            later_round,
            (table, new_state, done, exchange.all_sent(done)),
        )
        return table, new_state

    return jax.shard_map(
        local,
        in_specs=(by_row, state_spec, by_row, by_row, by_row, by_row, by_row, P()),
        out_specs=(by_row, state_spec),
    )(
        table,
        state,
        fetched.ids,
        row_gradients.astype(jnp.float32),
        merged.ids,
        merged.gradients,
        merged.done,
        scale,
    )


def _per_row(leaf: jax.Array, rows: int) -> bool:
    return leaf.ndim > 0 and leaf.shape[0] == rows


def _varying(x: jax.Array) -> jax.Array:
    """Marks a constant as differing between devices, as a loop's carry must be told."""
    return jax.lax.pcast(x, _axes(), to="varying")


def _distinct(addresses: jax.Array, total: int) -> tuple[jax.Array, jax.Array]:
    """Ascending distinct non-negative addresses, padded with `total`; and each one's place.

    The place of a negative address is out of range, so that nothing is read or added there.
    """
    flat = jnp.where(addresses < 0, total, addresses).reshape(-1)
    ids, place = jnp.unique(flat, return_inverse=True, size=flat.size, fill_value=total)
    place = jnp.where(addresses < 0, flat.size, place.reshape(addresses.shape))
    return ids.astype(jnp.int32), place.astype(jnp.int32)


class _Exchange:
    """One device's side of asking the owners for its distinct ids, round by round.

    In every round each owner serves, to all devices alike, one range of row ids: from where
    the last round stopped up to the first id that would overflow some device's capacity.
    """

    def __init__(self, ids: jax.Array, rows_per_device: int):
        self.ids = ids
        self.devices = _devices()
        self.rows_per_device = rows_per_device
        self.capacity = min(len(ids), -(-int(CAPACITY_FACTOR * len(ids)) // self.devices))
        owners = jnp.arange(self.devices, dtype=jnp.int32)
        self.owner_end = (owners + 1) * rows_per_device
        self.first = jnp.searchsorted(ids, owners * rows_per_device).astype(jnp.int32)
        self.last = jnp.searchsorted(ids, self.owner_end).astype(jnp.int32)

    def swap(self, x: jax.Array) -> jax.Array:
        """[devices * capacity, ...] by owner to the same by asking device, or back."""
        return jax.lax.all_to_all(x, _axes(), 0, 0, tiled=True)

    def all_sent(self, start: jax.Array) -> jax.Array:
        """1 where no device has anything left to ask, the same on all: int32 []."""
        return jax.lax.pmin(jnp.all(start >= self.last).astype(jnp.int32), _axes())

    def _window(self, start: jax.Array) -> tuple[jax.Array, jax.Array]:
        beyond = jnp.minimum(start + self.capacity, len(self.ids) - 1)
        overflow = start + self.capacity < self.last
        limit = jax.lax.pmin(jnp.where(overflow, self.ids[beyond], self.owner_end), _axes())
        stop = jnp.searchsorted(self.ids, limit).astype(jnp.int32)
        slots = start[:, None] + jnp.arange(self.capacity, dtype=jnp.int32)
        slots = jnp.where(slots < stop[:, None], slots, len(self.ids)).reshape(-1)
        return slots, jnp.maximum(stop, start)

    def ask(self, start: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
        """One round of questions.

        Returns:
          asked: the owner's local rows that devices ask for, [devices * capacity].
          slots: places in `ids` that this device asked for, [devices * capacity].
          stop: where the next round starts, [devices].
          finished: 1 where this was the last round.
        """
        slots, stop = self._window(start)
        nothing = self.devices * self.rows_per_device
        wanted = self.ids.at[slots].get(mode="fill", fill_value=nothing)
        asked = self.swap(wanted) - jax.lax.axis_index(_axes()) * self.rows_per_device
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
        ids, place = _distinct(asked, self.rows_per_device)
        merged = jax.ops.segment_sum(received, place, num_segments=len(ids))
        return ids, merged, stop, finished
