"""Where rows of the memory lie, and which distinct ones a batch names.

A pod's tables may have more rows than an int32 counts. So a row is named by its address in its own
table, and found at a place: the device that has it, and its number there.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

# What an int32 counts. Rows of a larger memory are sorted by two of them, which takes longer.
ONE_WORD = 2**31


class Place(NamedTuple):
    """Where rows lie.

    Attributes:
      owner: int32, the device that has a row; the number of devices for none.
      row: int32, its number there; the number of a device's rows for none.
    """

    owner: jax.Array
    row: jax.Array


def locate(addresses: jax.Array, tables: int, devices: int, rows_per_device: int) -> Place:
    """The places [..., A] of addresses.

    Args:
      addresses: int32 [..., A], negative for none, those of one table in every `tables`-th column.
        Row i of table t is row `i * tables + t` of all, of which devices have equal, consecutive
        parts.
    """
    # i * tables by doubling, in uint32 numbers whose base is the rows of a device.
    base = jnp.uint32(rows_per_device)
    address = jnp.maximum(addresses, 0).astype(jnp.uint32)
    owner = row = jnp.zeros_like(address)
    for digit in f"{tables:b}":
        owner, row = _carried(2 * owner, 2 * row, base)
        if digit == "1":
            owner, row = _carried(owner + address // base, row + address % base, base)
    table = jnp.arange(addresses.shape[-1], dtype=jnp.uint32) % tables
    owner, row = _carried(owner, row + table, base)
    exists = addresses >= 0
    return Place(
        jnp.where(exists, owner.astype(jnp.int32), devices),
        jnp.where(exists, row.astype(jnp.int32), rows_per_device),
    )


def _carried(owner: jax.Array, row: jax.Array, base: jax.Array) -> tuple[jax.Array, jax.Array]:
    return owner + row // base, row % base


def distinct_places(
    places: Place, devices: int, rows_per_device: int, most: int
) -> tuple[Place, jax.Array]:
    """Ascending distinct places [most], then those of none; and the index of each of `places` [N].

    The index of none is out of range, so that nothing is read or added there.

    Args:
      most: how many are distinct at most.
    """
    none = places.owner == devices
    total = devices * rows_per_device
    if total < ONE_WORD:
        flat = jnp.where(none, total, places.owner * rows_per_device + places.row)
        ids, index = distinct(flat, total, most)
        row = jnp.where(ids < total, ids % rows_per_device, rows_per_device)
        found = Place(ids // rows_per_device, row)
    else:
        words, index = _by_sorting(*places, nothing=(devices, rows_per_device), most=most)
        found = Place(*words)
    return found, jnp.where(none, most, index)


def distinct(flat: jax.Array, nothing: int, most: int) -> tuple[jax.Array, jax.Array]:
    """Ascending distinct numbers [most] below `nothing`, padded with it; and each one's index [N].

    Args:
      flat: int32 [N].
      most: how many are distinct at most, but for `nothing`, whose index may be any.
    """

    def by_sorting(flat: jax.Array) -> tuple[jax.Array, jax.Array]:
        (ids,), index = _by_sorting(flat, nothing=(nothing,), most=most)
        return ids, index

    by_search = partial(_by_search, nothing=nothing, most=most)
    return jax.lax.platform_dependent(flat, cpu=by_search, default=by_sorting)


def _by_sorting(
    *words: jax.Array, nothing: tuple[int, ...], most: int
) -> tuple[list[jax.Array], jax.Array]:
    """Of numbers in several words, the first of which counts most."""
    size = len(words[0])
    *ascending, origin = jax.lax.sort(
        (*words, jnp.arange(size, dtype=jnp.int32)), num_keys=len(words)
    )
    slot, ids = _without_repeats(*ascending, nothing=nothing, most=most)
    return ids, jnp.zeros(size, jnp.int32).at[origin].set(slot, unique_indices=True)


def _by_search(flat: jax.Array, *, nothing: int, most: int) -> tuple[jax.Array, jax.Array]:
    """Sorts no places along with the numbers, which takes a CPU ten times as long."""
    _, (ids,) = _without_repeats(jnp.sort(flat), nothing=(nothing,), most=most)
    return ids, jnp.searchsorted(ids, flat).astype(jnp.int32)


def _without_repeats(
    *ascending: jax.Array, nothing: tuple[int, ...], most: int
) -> tuple[jax.Array, list[jax.Array]]:
    """Each number's place among the distinct ones; and these, padded."""
    differs = jnp.any(jnp.stack([word[1:] != word[:-1] for word in ascending]), axis=0)
    new = jnp.concatenate([jnp.ones(1, bool), differs])
    slot = jnp.cumsum(new, dtype=jnp.int32) - 1
    first = jnp.where(new, slot, most)
    return slot, [
        jnp.full(most, padding, jnp.int32).at[first].set(word, mode="drop", unique_indices=True)
        for word, padding in zip(ascending, nothing, strict=True)
    ]
