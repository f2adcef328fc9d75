"""A fresh memory in the host's memory, computed a piece at a time: no device could hold it."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.extend.random import threefry_2x32
from jax.sharding import PartitionSpec as P

from prefixmem_jax.memory.exchange import devices
from prefixmem_jax.memory.host_lines import to_host
from prefixmem_jax.memory.table import INIT_STD, Table
from prefixmem_jax.parallel.sharding import row_spec

LINES_AT_ONCE = 2**13


def fresh_rows(
    table: Table, optimizer: optax.GradientTransformation, key: jax.Array
) -> tuple[jax.Array, Any]:
    """`Table.init` and `Table.init_optimizer` in the host's memory; under a mesh."""
    lines, numbers = table.shape
    piece = math.gcd(lines // devices(), LINES_AT_ONCE)
    # Counters of the random numbers have 64 bits; so these are no work for a device.
    starts = np.arange(0, lines, piece, dtype=np.uint64) * np.uint64(numbers)
    words = np.stack([starts >> np.uint64(32), starts], axis=1).astype(np.uint32)
    rows = piece * numbers // table.width

    def init_state() -> Any:
        return optimizer.init(jnp.zeros((rows, table.width), jnp.float32))

    per_row = jax.tree.map(
        lambda leaf: leaf.shape in ((rows, table.width), (rows,)), jax.eval_shape(init_state)
    )

    def one_piece(key: jax.Array, start: jax.Array) -> tuple[jax.Array, Any]:
        new = (INIT_STD * normal(key, start, piece * numbers)).astype(table.dtype)
        state = jax.tree.map(
            lambda mine, leaf: (
                to_host(leaf.reshape(piece, -1) if leaf.ndim == 2 else leaf)
                if mine
                else jnp.zeros(())
            ),
            per_row,
            init_state(),
        )
        return to_host(new.reshape(piece, numbers)), state

    def own(key: jax.Array, words: jax.Array) -> tuple[jax.Array, Any]:
        new, state = jax.lax.map(partial(one_piece, key), words)
        state = jax.tree.map(
            lambda mine, pieces, leaf: _joined(pieces) if mine else leaf,
            per_row,
            state,
            init_state(),
        )
        return _joined(new), state

    at = row_spec()
    lies = jax.tree.map(lambda mine: at if mine else P(), per_row)
    return jax.shard_map(own, in_specs=(P(), at), out_specs=(at, lies), check_vma=False)(
        key, jax.sharding.reshard(jnp.asarray(words), at)
    )


def _joined(pieces: jax.Array) -> jax.Array:
    """[pieces, n, ...] to [pieces * n, ...]."""
    return pieces.reshape(-1, *pieces.shape[2:])


def normal(key: jax.Array, start: jax.Array, count: int) -> jax.Array:
    """Some of the numbers of `jax.random.normal(key, shape)` of any shape, float32 [count].

    JAX draws a number from its place alone, but has no function for a stretch of them.

    Args:
      key: of JAX's default kind.
      start: uint32 [2], high and low word of the first one's place.
    """
    high, low = start
    lows = low + jnp.arange(count, dtype=jnp.uint32)
    highs = high + (lows < low).astype(jnp.uint32)
    words = threefry_2x32(jax.random.key_data(key), jnp.concatenate([highs, lows]))
    bits = words[:count] ^ words[count:]
    one = np.float32(1)
    uniform = jax.lax.bitcast_convert_type((bits >> 9) | one.view(np.uint32), jnp.float32) - one
    lowest = np.nextafter(-one, np.float32(0))
    uniform = jnp.maximum(lowest, uniform * (one - lowest) + lowest)
    return np.float32(math.sqrt(2)) * jax.lax.erf_inv(uniform)
