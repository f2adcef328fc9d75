"""The hash against the paper's formula in Python's integers, bit for bit."""

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from prefixmem_jax.memory import hashing


def reference_addresses(
    codes: np.ndarray,
    multipliers_LH: np.ndarray,
    *,
    scheme: hashing.AddressScheme,
    orders: int,
    rows: int,
    items: np.ndarray | None = None,
    count: int = 0,
) -> np.ndarray:
    """`hashing.addresses` of one prefix c_1..c_l: int32 [tables].

    With n-grams of up to `count` items, `items` [any, levels] are those before the next one's
    prefix, oldest first: where the prefix is a whole SID, the last of them is its own.

    Written from the formula with Python's unbounded integers, so that wrap-around is explicit.
    """
    heads = multipliers_LH.shape[1]
    length = len(codes)
    tables = hashing.table_count(scheme, orders, heads, count)
    out = np.full(tables, hashing.NO_ADDRESS, np.int32)
    if scheme == "full_prefix":
        spans = [(0, min(length, orders))] if length else []
    elif scheme == "suffix":
        spans = [(length - n, length) for n in range(1, min(length, orders) + 1)]
    else:
        spans = [(0, n) for n in range(1, min(length, orders) + 1)]
    for number, (start, stop) in enumerate(spans):
        for head in range(heads):
            hashed = 0
            for i in range(start, stop):
                hashed ^= (int(codes[i]) * int(multipliers_LH[i, head])) % 2**32
            out[number * heads + head] = hashed % rows
    levels = len(multipliers_LH) // (1 + count)
    for number in range(min(count, 0 if items is None else len(items))):
        for head in range(heads):
            hashed = 0
            for i in range(length % levels):
                hashed ^= (int(codes[i]) * int(multipliers_LH[i, head])) % 2**32
            for k in range(number + 1):
                for i in range(levels):
                    factor = int(multipliers_LH[(1 + k) * levels + i, head])
                    hashed ^= (int(items[-1 - k][i]) * factor) % 2**32
            out[(tables // heads - count + number) * heads + head] = hashed % rows
    return out


def row_numbers(addresses: np.ndarray, tables: int) -> np.ndarray:
    """Of all tables' rows: int64 [..., tables], -1 for none."""
    numbers = np.asarray(addresses).astype(np.int64) * tables + np.arange(tables)
    return np.where(np.asarray(addresses) < 0, -1, numbers)


@settings(max_examples=20, deadline=None)
@given(
    seed=st.integers(0, 1000),
    levels=st.integers(2, 6),
    heads=st.integers(1, 4),
    rows=st.one_of(st.integers(1, 100), st.sampled_from([2**14, 2_000_000, 5_000_000])),
    scheme=st.sampled_from(hashing.SCHEMES),
    data=st.data(),
)
def test_the_device_follows_the_formula(seed, levels, heads, rows, scheme, data):
    orders = data.draw(st.integers(1, levels))
    multipliers = hashing.make_multipliers(seed, levels, heads)
    rng = np.random.default_rng(seed)
    level = rng.integers(0, levels + 1, (2, 5)).astype(np.int32)
    codes = rng.integers(0, 2**17, (2, 5, levels)).astype(np.int32)
    codes *= np.arange(levels) < level[..., None]
    found = jax.jit(
        lambda c, n: hashing.addresses(c, n, multipliers, scheme=scheme, orders=orders, rows=rows)
    )(codes, level)
    for place in np.ndindex(2, 5):
        expected = reference_addresses(
            codes[place][: level[place]], multipliers, scheme=scheme, orders=orders, rows=rows
        )
        assert np.array_equal(np.asarray(found[place]), expected)
    assert found.dtype == jnp.int32


def test_wrap_around_is_modulo_two_to_the_32():
    multipliers = np.array([[0xFFFFFFFF], [0x80000001]], np.uint32)
    codes = np.array([[[2047, 3]]], np.int32)
    found = hashing.addresses(
        codes, np.array([[2]]), multipliers, scheme="prefix", orders=2, rows=2_000_000
    )
    first = (2047 * 0xFFFFFFFF) % 2**32
    second = first ^ ((3 * 0x80000001) % 2**32)
    assert found[0, 0].tolist() == [first % 2_000_000, second % 2_000_000]


def test_multipliers_are_odd_distinct_and_fixed_by_the_seed():
    multipliers = hashing.make_multipliers(7, 5, 4)
    assert multipliers.dtype == np.uint32 and (multipliers % 2 == 1).all()
    assert len(np.unique(multipliers)) == multipliers.size
    assert np.array_equal(multipliers, hashing.make_multipliers(7, 5, 4))
    assert not np.array_equal(multipliers, hashing.make_multipliers(8, 5, 4))


def test_schemes_read_the_ngrams_they_name():
    """Positions that share an n-gram share its row, and only through it."""
    multipliers = hashing.make_multipliers(0, 4, 2)

    def rows_of(codes, scheme):
        return reference_addresses(
            np.array(codes), multipliers, scheme=scheme, orders=3, rows=10**6
        ).reshape(-1, 2)

    one, other = [5, 6, 7], [9, 6, 7]  # differ in the first code only
    assert (rows_of(one, "prefix") != rows_of(other, "prefix")).all()
    same = rows_of(one, "suffix") == rows_of(other, "suffix")
    assert same[:2].all() and not same[2].any()  # the uni- and bigram at the end are shared
    assert rows_of(one, "full_prefix").shape == (1, 2)
    assert (rows_of(one, "full_prefix") != rows_of(other, "full_prefix")).all()
    # c_1..c_n of a longer prefix is read from the same rows as in the shorter one.
    assert np.array_equal(rows_of([5, 6, 7], "prefix")[:2], rows_of([5, 6], "prefix")[:2])
