"""Where a prefix's memory rows lie: the paper's multiplicative XOR hash, on device and host.

`idx[n, h] = (XOR over the n-gram's codes c_i of c_i * p[i, h]) mod T`, in uint32 with
wrap-around. Three address schemes (the paper's ablation) differ in which n-grams of the prefix
c_1..c_l are hashed:

- `prefix`: c_1..c_n for n = 1..min(l, orders), the paper's default;
- `suffix`: c_{l-n+1}..c_l for n = 1..min(l, orders);
- `full_prefix`: only c_1..c_n with n = min(l, orders), in one set of tables.

p is indexed by the level of the code, so equal codes of different levels hash differently.

Beyond the paper, n-grams may be of whole items: the SIDs of the last k items and the prefix that
is being written after them, hashed alike with multipliers of their own.
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


def table_count(scheme: AddressScheme, orders: int, heads: int, items: int = 0) -> int:
    """Number of tables E[n, h] that a scheme looks up, with n-grams of up to so many items."""
    return heads * (items + (1 if scheme == "full_prefix" else orders))


def addresses(
    codes_BSL: jax.Array,
    level_BS: jax.Array,
    multipliers_LH: jax.Array | np.ndarray,
    *,
    scheme: AddressScheme,
    orders: int,
    rows: int,
    items: tuple[jax.Array, jax.Array] | None = None,
) -> jax.Array:
    """Rows of the memory to read at each position (Section "Method" of the paper).

    Args:
      codes_BSL: c_1..c_l of the prefix at each position in the first l places.
      level_BS: l, 0 where there is no prefix.
      multipliers_LH: uint32; with items, those of the k-th last item's levels follow.
      rows: T, rows in one table.
      items: `Vocabulary.last_items`, where n-grams of items are wanted: whether there are k items,
        [B, S, K], and the codes of the k-th last, [B, S, K, L].

    Returns:
      int32 [B, S, tables]: row idx of each table, or NO_ADDRESS where that n-gram does not exist.
    """
    levels, heads = codes_BSL.shape[-1], multipliers_LH.shape[1]
    multipliers_KLH = jnp.asarray(multipliers_LH).reshape(-1, levels, heads)
    terms = codes_BSL.astype(jnp.uint32)[..., None] * multipliers_KLH[0]
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
    if items is not None:
        exists_BSK, codes_BSKL = items
        hashed_BSH = at(level_BS % levels)  # of the prefix after the last whole item
        for number in range(exists_BSK.shape[-1]):
            terms = codes_BSKL[:, :, number].astype(jnp.uint32)[..., None]
            terms = terms * multipliers_KLH[1 + number]
            for i in range(levels):
                hashed_BSH = hashed_BSH ^ terms[:, :, i]
            grams.append((hashed_BSH, exists_BSK[..., number]))
    columns = [
        jnp.where(
            exists_BS[..., None], (hashed_BSH % jnp.uint32(rows)).astype(jnp.int32), NO_ADDRESS
        )
        for hashed_BSH, exists_BS in grams
    ]
    return jnp.concatenate(columns, axis=-1)
