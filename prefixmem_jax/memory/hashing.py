"""Where a prefix's memory rows lie: the paper's multiplicative XOR hash, on device and host.

`idx[n, h] = (XOR over the n-gram's codes c_i of c_i * p[i, h]) mod T`, in uint32 with
wrap-around. Three address schemes (the paper's ablation) differ in which n-grams of the prefix
c_1..c_l are hashed:

- `prefix`: c_1..c_n for n = 1..min(l, orders), the paper's default;
- `suffix`: c_{l-n+1}..c_l for n = 1..min(l, orders);
- `full_prefix`: only c_1..c_n with n = min(l, orders), in one set of tables.

p is indexed by the level of the code, so equal codes of different levels hash differently.
"""

from __future__ import annotations

from typing import Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np

AddressScheme = Literal["prefix", "suffix", "full_prefix"]
SCHEMES: tuple[str, ...] = get_args(AddressScheme)
NO_ADDRESS = -1


def make_multipliers(seed: int, levels: int, heads: int) -> np.ndarray:
    """Odd uint32 multipliers p[i, h], [levels, heads], fixed by the seed."""
    rng = np.random.Generator(np.random.PCG64(seed))
    return rng.integers(0, 2**32, size=(levels, heads), dtype=np.uint32) | np.uint32(1)


def table_count(scheme: AddressScheme, orders: int, heads: int) -> int:
    """Number of tables E[n, h] that a scheme looks up."""
    return heads if scheme == "full_prefix" else orders * heads


def addresses(
    codes_BSL: jax.Array,
    level_BS: jax.Array,
    multipliers_LH: jax.Array | np.ndarray,
    *,
    scheme: AddressScheme,
    orders: int,
    rows: int,
) -> jax.Array:
    """Rows of the memory to read at each position (Section "Method" of the paper).

    Args:
      codes_BSL: c_1..c_l of the prefix at each position in the first l places.
      level_BS: l, 0 where there is no prefix.
      multipliers_LH: uint32.
      rows: T, rows in one table.

    Returns:
      int32 [B, S, tables]: row `idx * tables + table` of the one array that holds every table
      (interleaved, so that each device's block of rows holds an equal share of each table), or
      NO_ADDRESS where that n-gram does not exist.
    """
    levels, heads = multipliers_LH.shape
    terms = codes_BSL.astype(jnp.uint32)[..., None] * jnp.asarray(multipliers_LH)
    # running[n] is the XOR over the first n codes, so any n-gram is running[a] ^ running[b].
    running = [jnp.zeros_like(terms[:, :, 0])]
    for i in range(levels):
        running.append(running[-1] ^ terms[:, :, i])
    running_BSNH = jnp.stack(running, axis=2)

    def at(n_BS: jax.Array) -> jax.Array:
        index = jnp.clip(n_BS, 0, levels)[:, :, None, None]
        return jnp.take_along_axis(running_BSNH, index, axis=2)[:, :, 0]

    if scheme == "full_prefix":
        grams = [(at(jnp.minimum(level_BS, orders)), level_BS > 0)]
    elif scheme == "suffix":
        grams = [(at(level_BS) ^ at(level_BS - n), level_BS >= n) for n in range(1, orders + 1)]
    else:
        grams = [(running[min(n, levels)], level_BS >= n) for n in range(1, orders + 1)]
    tables = table_count(scheme, orders, heads)
    columns = []
    for number, (hashed_BSH, exists_BS) in enumerate(grams):
        table = number * heads + jnp.arange(heads, dtype=jnp.int32)
        row = (hashed_BSH % jnp.uint32(rows)).astype(jnp.int32) * tables + table
        columns.append(jnp.where(exists_BS[..., None], row, NO_ADDRESS))
    return jnp.concatenate(columns, axis=-1)
