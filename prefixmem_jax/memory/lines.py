"""How memory rows lie in the array that holds them: side by side in lines of 128 numbers.

A TPU tiles arrays by 128 lanes. An array [rows, 64] is either padded to twice its size there or
kept column by column, and then every gather first copies the whole table. Lines of 128 numbers
are gathered and scattered in place. In row-major memory (CPU, GPU) a line is no more than a
reshape of its rows. Rows wider than a line, or of a width that does not divide it, are lines of
their own. Lines in the host's memory are read and written whole (`memory.host_lines`).
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp

from prefixmem_jax.memory import host_lines

LANES = 128


def rows_per_line(width: int) -> int:
    """How many rows of this width share one line."""
    return LANES // width if LANES % width == 0 else 1


def read(lines: jax.Array, ids: jax.Array, width: int) -> jax.Array:
    """Rows [K, width] at ids int32 [K]; zero where the id is out of range.

    Args:
      lines: [lines, rows_per_line * width]; or [rows], one number a row, read as [K].
    """
    if lines.ndim == 1:
        return _taken(lines, ids)
    if host_lines.is_on_host(lines):
        return read_by_line(lines, ids, width=width)
    return jax.lax.platform_dependent(
        lines,
        ids,
        tpu=partial(read_by_line, width=width),
        default=partial(read_by_row, width=width),
    )


def write(lines: jax.Array, ids: jax.Array, rows: jax.Array) -> jax.Array:
    """Puts rows [K, width] (or numbers [K]) at ids; those out of range are dropped.

    Args:
      lines: as for `read`; donated or carried by a loop, it is written in place.
      ids: int32 [K], ascending; distinct, but for those out of range.
    """
    rows = rows.astype(lines.dtype)
    if lines.ndim == 1:
        return _with(lines, ids, rows)
    if host_lines.is_on_host(lines):
        return write_by_line(lines, ids, rows)
    return jax.lax.platform_dependent(lines, ids, rows, tpu=write_by_line, default=write_by_row)


def read_by_row(lines: jax.Array, ids: jax.Array, *, width: int) -> jax.Array:
    return lines.reshape(-1, width).at[ids].get(mode="fill", fill_value=0)


def write_by_row(lines: jax.Array, ids: jax.Array, rows: jax.Array) -> jax.Array:
    table = lines.reshape(-1, rows.shape[1])
    return table.at[ids].set(rows, mode="drop", unique_indices=True).reshape(lines.shape)


def read_by_line(lines: jax.Array, ids: jax.Array, *, width: int) -> jax.Array:
    pack = lines.shape[1] // width
    part = _taken(lines, ids // pack)
    while pack > 1:  # the half that the row is in
        pack //= 2
        first, second = jnp.split(part, 2, axis=1)
        part = jnp.where((ids // pack % 2 == 0)[:, None], first, second)
    return part


def write_by_line(lines: jax.Array, ids: jax.Array, rows: jax.Array) -> jax.Array:
    """Reads the lines that the rows lie in, replaces these rows, writes the lines back."""
    width = rows.shape[1]
    pack = lines.shape[1] // width
    if pack == 1:
        return _with(lines, ids, rows)
    line = ids // pack
    replaced = (ids % pack)[:, None] == jnp.arange(pack * width) // width
    new = jnp.tile(rows, (1, pack))
    # The ids ascend, so rows of one line are neighbours: the first takes those of the others. What
    # is not replaced means nothing.
    ahead = 1
    while ahead < min(pack, len(ids)):
        theirs, brought = _ahead(new, ahead), _ahead(replaced, ahead)
        same = jnp.concatenate([line[ahead:] == line[:-ahead], jnp.zeros(ahead, bool)])
        new = jnp.where(replaced, new, theirs)
        replaced |= brought & same[:, None]
        ahead *= 2
    first = jnp.concatenate([jnp.ones(1, bool), line[1:] != line[:-1]])
    whole = jnp.where(replaced, new, _taken(lines, line))
    return _with(lines, jnp.where(first, line, lines.shape[0]), whole)


def _ahead(x: jax.Array, places: int) -> jax.Array:
    """What stands so many places after, zero beyond the end."""
    return jnp.pad(x, ((0, places), (0, 0)))[places:]


def _taken(lines: jax.Array, index: jax.Array) -> jax.Array:
    """Lines at an index, zero where it is out of range."""
    if host_lines.is_on_host(lines):
        return host_lines.take(lines, index)
    return lines.at[index].get(mode="fill", fill_value=0)


def _with(lines: jax.Array, index: jax.Array, new: jax.Array) -> jax.Array:
    """Lines with new ones at an index; those out of range are dropped."""
    if host_lines.is_on_host(lines):
        return host_lines.put(lines, index, new)
    return lines.at[index].set(new, mode="drop", unique_indices=True)
