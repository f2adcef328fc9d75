"""The memory table: one row-sharded array, fetched and updated only where a batch touches it.

All tables E[n, h] are one array, its rows sharded over every mesh axis. A train step fetches the
distinct rows that its batch names (`fetch`), differentiates with respect to those rows (never the
table), brings the gradients of equal rows together at their owner in float32 (`merge`), and updates
just these rows in place (`apply`). Cost does not depend on the number of rows.

On several devices, each device removes its own duplicates first, then asks the owners. Static
shapes need a capacity: a device may ask an owner for at most `capacity` rows in one exchange.
Where a batch needs more, the exchange is repeated over consecutive ranges of row ids, so that
the result is exact for every input and every row is updated exactly once. Hashed addresses are
spread evenly, so one exchange is the rule; `Fetched.rounds` counts them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import PartitionSpec as P

from prefixmem_jax.errors import UserError
from prefixmem_jax.memory import lines
from prefixmem_jax.memory.exchange import Exchange, Merged, axes, capacity, devices, varying
from prefixmem_jax.memory.host_lines import is_on_host
from prefixmem_jax.memory.places import Place, distinct_places, locate
from prefixmem_jax.memory.rounding import round_stochastically
from prefixmem_jax.parallel.sharding import row_spec, spec

# Lines are padded to a multiple of this, whatever the number of devices, so that a checkpoint
# has one shape everywhere.
LINE_MULTIPLE = 4096

# Of fresh rows.
INIT_STD = 0.02

# A batch's addresses: tensor-parallel devices, which share a part of the batch, divide its
# positions among them, so that no address is asked for twice.
ADDRESSES = spec("batch", "shared_length")


class Lookup(NamedTuple):
    """What a batch looks up in the table: addresses, and later, in their places, rows.

    Attributes:
      by_position: int32 [batch, positions, A], row in a table, negative for none, with the tables
        by turns along the last axis; rows float32 [..., width].
      shared: what all positions share, int32 [any, A]: each device fetches its share of the first
        axis, which must divide by the devices.
      names: handed on with the rows; whatever tells what `shared` is.
    """

    by_position: jax.Array | None = None
    shared: jax.Array | None = None
    names: jax.Array | None = None

    def map(self, function: Callable[[jax.Array, P], jax.Array]) -> Lookup:
        """Function of each array there is and how it lies on the mesh; names stay."""
        spread = ((self.by_position, ADDRESSES), (self.shared, row_spec()))
        return Lookup(*(None if x is None else function(x, at) for x, at in spread), self.names)


class Fetched(NamedTuple):
    """The distinct rows that each device's share of the batch names.

    Attributes:
      places: int32 [devices * M] each, per device ascending and distinct, then those of none.
      rows: float32 [devices * M, width], zero for the padding.
      index: the addresses' places in the device's own share of `rows`.
      rounds: int32 [], exchanges that were needed (1 unless owners were unevenly loaded).
    """

    places: Place
    rows: jax.Array
    index: Lookup
    rounds: jax.Array

    @property
    def count(self) -> jax.Array:
        """How many there are, of all devices together: int32 []."""
        return jnp.sum(self.places.owner < devices(), dtype=jnp.int32)


@jax.named_scope("table")
def spread(fetched: Fetched) -> Lookup:
    """Rows at every address of the batch: [..., width], zero where there was no address.

    Its gradient with respect to `fetched.rows` sums over equal addresses of a device.
    """

    def rows_at(index: jax.Array, at: P) -> jax.Array:
        return jax.shard_map(_indexed, in_specs=(row_spec(), at), out_specs=at)(fetched.rows, index)

    return fetched.index.map(rows_at)


def _indexed(rows_MD: jax.Array, index: jax.Array) -> jax.Array:
    return rows_MD.at[index].get(mode="fill", fill_value=0)


@dataclass(frozen=True)
class Table:
    """What the array of rows looks like, and how it is read and updated.

    Functions that take `memory` want the array itself: [lines, numbers per line] of `shape`.

    Attributes:
      rows: in each of the tables.
      width: numbers in a row.
      tables: how many there are, their rows by turns in one array, so that each device's part holds
        an equal share of each.
      dtype: how rows are stored; whatever it is, they are used and updated in float32.
      density: share of a batch's addresses that are expected to name distinct rows. It sizes the
        exchange between devices; a batch with more is served in more than one.
      most_distinct: the largest share of a stretch of positions' addresses that can. It sizes what
        a step computes with: rows beyond it would be lost.
      most_cut: how many more can where a stretch begins within an item.
    """

    rows: int
    width: int
    tables: int = 1
    dtype: str = "float32"
    density: float = 1.0
    most_distinct: float = 1.0
    most_cut: int = 0

    @property
    def shape(self) -> tuple[int, int]:
        pack = lines.rows_per_line(self.width)
        count = -(-self.rows * self.tables // (pack * LINE_MULTIPLE)) * LINE_MULTIPLE
        return count, pack * self.width

    @property
    def padded_rows(self) -> int:
        return self.shape[0] * self.shape[1] // self.width

    def rows_per_device(self, count: int) -> int:
        """What each of `count` devices has.

        Raises:
          UserError: their lines do not divide by the devices, or an int32 does not count the rows.
        """
        pieces = self.shape[0] // LINE_MULTIPLE
        apart = math.lcm(LINE_MULTIPLE, count) // LINE_MULTIPLE
        if pieces % apart:
            whole = -(-pieces // apart) * apart * LINE_MULTIPLE * lines.rows_per_line(self.width)
            raise UserError(
                f"sid_encoder.rows={self.rows}: the lines of {self.tables} tables do not divide by "
                f"{count} devices; expected {whole // self.tables}, or a power of two of devices"
            )
        rows = self.padded_rows // count
        if rows >= 2**31:
            raise UserError(
                f"sid_encoder.rows={self.rows}: {self.tables} tables are {rows} rows a device on "
                f"{count}; expected fewer than 2^31, so more devices"
            )
        return rows

    @property
    def of_beams(self) -> Table:
        """The same for addresses that are of no stretch of positions: all may be distinct."""
        return replace(self, most_distinct=1.0)

    def init(self, key: jax.Array) -> jax.Array:
        """Fresh rows, the same on any number of devices."""
        return (INIT_STD * jax.random.normal(key, self.shape, jnp.float32)).astype(self.dtype)

    def init_optimizer(self, optimizer: optax.GradientTransformation) -> Any:
        """The optimizer's state for all rows, in float32, its leaves lying as the rows do."""
        by_row = (self.padded_rows, self.width)
        state = optimizer.init(jnp.zeros(by_row, jnp.float32))
        return jax.tree.map(
            lambda leaf: leaf.reshape(self.shape) if leaf.shape == by_row else leaf, state
        )

    def is_per_row(self, leaf: Any) -> bool:
        """Whether an array holds something for every row (else it is a count or the like)."""
        return leaf.shape in (self.shape, (self.padded_rows,))

    def partition(self, leaf: Any) -> P:
        """How the rows, or a leaf of their optimizer state, lie on the mesh."""
        return row_spec() if self.is_per_row(leaf) else P()

    def bytes_served(self, addresses: int, over: int) -> int:
        """Bytes of rows that a device reads from its own part in one exchange.

        Args:
          addresses: of a batch, on each device.
          over: devices.
        """
        if over == 1:
            rows = math.ceil(self.most_distinct * addresses)
        else:
            rows = over * capacity(addresses, self.density, over)
        return rows * self.width * jnp.dtype(self.dtype).itemsize

    @jax.named_scope("table")
    def gather(self, memory: jax.Array, addresses: jax.Array) -> jax.Array:
        """Rows float32 [..., width] at addresses [...], zero where the address is negative.

        The plain gather from a table that is whole on one device; the reference for `fetch`.
        """
        at = locate(addresses, self.tables, 1, self.rows_per_device(1)).row
        rows = lines.read(memory, at.reshape(-1), self.width).astype(jnp.float32)
        return rows.reshape(*addresses.shape, self.width)

    @jax.named_scope("table")
    def gather_by_exchange(self, memory: jax.Array, addresses: jax.Array) -> jax.Array:
        """As `gather`, inside `shard_map` over every axis of the mesh.

        Args:
          memory: this device's share of the rows; addresses: this device's own.
        """
        if devices() == 1:
            return self.gather(memory, addresses)
        fetched = self.of_beams._fetch_local(memory, Lookup(addresses))
        return _indexed(fetched.rows, fetched.index.by_position)

    @jax.named_scope("table")
    def fetch(self, memory: jax.Array, addresses: Lookup) -> Fetched:
        """Fetches the distinct rows that a batch names."""
        rows = row_spec()
        placed = addresses._replace(names=None).map(jax.sharding.reshard)
        lies = placed.map(lambda _, at: at)
        fetched = jax.shard_map(
            self._fetch_local, in_specs=(rows, lies), out_specs=Fetched(rows, rows, lies, P())
        )(memory, placed)
        return fetched._replace(index=fetched.index._replace(names=addresses.names))

    def _exchange(self, places: Place) -> Exchange:
        return Exchange(places, self.rows_per_device(devices()), self.density / self.most_distinct)

    def _most(self, addresses: Lookup) -> int:
        """Distinct rows that a device's addresses can name."""
        most = 0 if addresses.shared is None else addresses.shared.size
        if addresses.by_position is not None:
            of_row = math.prod(addresses.by_position.shape[1:])
            bound = math.ceil(self.most_distinct * of_row) + self.most_cut
            most += len(addresses.by_position) * min(of_row, bound)
        return most

    def _distinct(self, addresses: Lookup) -> tuple[Place, Lookup]:
        """The distinct places that a device's addresses name, and each address's index in them."""
        size = (devices(), self.rows_per_device(devices()))
        leaves, form = jax.tree.flatten(addresses)
        located = [jax.tree.map(jnp.ravel, locate(x, self.tables, *size)) for x in leaves]
        together = jax.tree.map(lambda *parts: jnp.concatenate(parts), *located)
        places, index = distinct_places(together, *size, self._most(addresses))
        ends = np.cumsum([x.size for x in leaves])[:-1]
        parts = zip(jnp.split(index, ends), leaves, strict=True)
        return places, jax.tree.unflatten(form, (part.reshape(x.shape) for part, x in parts))

    def _fetch_local(self, memory: jax.Array, addresses: Lookup) -> Fetched:
        places, index = self._distinct(addresses)
        if devices() == 1:
            rows = lines.read(memory, places.row, self.width).astype(jnp.float32)
            return Fetched(places, rows, index, jnp.int32(1))
        exchange = self._exchange(places)

        def one_round(carry: tuple) -> tuple:
            rows, start, _, rounds = carry
            asked, slots, stop, finished = exchange.ask(start)
            answered = exchange.swap(lines.read(memory, asked, self.width))
            rows = rows.at[slots].set(
                answered.astype(jnp.float32), mode="drop", unique_indices=True
            )
            return rows, stop, finished, rounds + 1

        empty = varying(jnp.zeros((exchange.size, self.width), jnp.float32))
        first = one_round((empty, exchange.first, jnp.int32(0), jnp.int32(0)))
        rows, _, _, rounds = jax.lax.while_loop(lambda carry: carry[2] == 0, one_round, first)
        return Fetched(places, rows, index, rounds)

    @jax.named_scope("table")
    def merge(self, fetched: Fetched, row_gradients: jax.Array) -> Merged:
        """Brings row gradients [devices * M, width] to the owners and sums equal rows."""
        by_row = row_spec()
        return jax.shard_map(
            self._merge_local,
            in_specs=(by_row, by_row),
            out_specs=Merged(*(by_row,) * 5, P()),
        )(fetched.places, row_gradients)

    def _merge_local(self, places: Place, gradients: jax.Array) -> Merged:
        if devices() == 1:
            squared = jax.lax.psum(jnp.sum(gradients**2), axes())
            none_sent = varying(jnp.zeros(1, jnp.int32))
            return Merged(places, gradients, places.row, gradients, none_sent, squared)
        exchange = self._exchange(places)
        owned, sums, stop, finished = exchange.gather_gradients(exchange.first, gradients)

        def later_round(carry: tuple) -> tuple:
            start, _, total = carry
            _, more, stop, finished = exchange.gather_gradients(start, gradients)
            return stop, finished, total + jnp.sum(more**2)

        _, _, squared = jax.lax.while_loop(
            lambda carry: carry[1] == 0, later_round, (stop, finished, jnp.sum(sums**2))
        )
        squared = jax.lax.psum(squared, axes())
        return Merged(places, gradients, owned, sums, stop, squared)

    @jax.named_scope("table")
    def apply(
        self,
        memory: jax.Array,
        state: Any,
        merged: Merged,
        optimizer: optax.GradientTransformation,
        scale: jax.Array,
        key: jax.Array,
    ) -> tuple[jax.Array, Any, jax.Array]:
        """Applies an optax transformation to the rows in the batch and to no others.

        Leaves of the optimizer state with one entry per row are read and written only at these
        rows; the others (step counts) advance once per call. So Adam is *lazy* here: a row's
        moments decay only in the steps that touch it.

        Args:
          memory: donate it and the state to update in place.
          state: as from `init_optimizer`.
          scale: factor for the gradients (global-norm clipping). Where it is NaN, the gradients are
            not finite, and nothing changes.
          key: random key of this step, for stochastic rounding of bfloat16 rows.

        Returns:
          The new rows and optimizer state, and the squared norm of what was added to the rows.
        """
        state_spec = jax.tree.map(self.partition, state)
        by_row = row_spec()
        return jax.shard_map(
            partial(self._apply_local, optimizer, jax.tree.map(self.is_per_row, state)),
            in_specs=(by_row, state_spec, Merged(*(by_row,) * 5, P()), P(), P()),
            out_specs=(by_row, state_spec, P()),
        )(memory, state, merged, scale, key)

    def _apply_local(
        self,
        optimizer: optax.GradientTransformation,
        per_row: Any,
        memory: jax.Array,
        state: Any,
        merged: Merged,
        scale: jax.Array,
        key: jax.Array,
    ) -> tuple[jax.Array, Any, jax.Array]:
        """As `apply`, on one device's share; `per_row` says which leaves of the state have rows."""
        local_rows = self.rows_per_device(devices())
        finite = ~jnp.isnan(scale)

        def update(carry: tuple, owned: jax.Array, gradients: jax.Array) -> tuple:
            """Distinct rows of one exchange; those of a step's exchanges are disjoint."""
            memory, new_state, squared_norm = carry
            owned = jnp.where(finite, owned, local_rows)  # out of range: nothing is written
            before = lines.read(memory, owned, self.width).astype(jnp.float32)
            at_rows = jax.tree.map(
                lambda mine, leaf, old: lines.read(leaf, owned, self.width) if mine else old,
                per_row,
                new_state,
                state,  # step counts advance once, however many exchanges
            )
            updates, after = optimizer.update(gradients * scale, at_rows, before)
            rows = before + updates
            added = jnp.where((owned < local_rows)[:, None], updates, 0.0)
            squared_norm += jnp.sum(added**2)
            if self.dtype == "bfloat16":
                first_row = jax.lax.axis_index(axes()) * local_rows
                rows = round_stochastically(rows, first_row + owned, key)

            def kept(mine: bool, leaf: jax.Array, old: jax.Array, new: jax.Array) -> jax.Array:
                return lines.write(leaf, owned, new) if mine else jnp.where(finite, new, old)

            new_state = jax.tree.map(kept, per_row, new_state, state, after)
            return lines.write(memory, owned, rows), new_state, squared_norm

        carry = (memory, state, varying(jnp.float32(0)))
        if devices() == 1:
            carry = update(carry, merged.owned, merged.owned_gradients)
        else:
            exchange = self._exchange(merged.places)
            carry = exchange.each_round(update, carry, merged, is_on_host(memory))
        memory, state, squared_norm = carry
        return memory, state, jax.lax.psum(squared_norm, axes())
