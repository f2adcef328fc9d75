"""The sharded table against the dense one-device reference, on 1 to 8 devices."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding

from prefixmem_jax.config_groups import MeshConfig
from prefixmem_jax.errors import UserError
from prefixmem_jax.memory import lines
from prefixmem_jax.memory.fresh_rows import fresh_rows, normal
from prefixmem_jax.memory.places import (
    Place,
    _by_search,
    _by_sorting,
    distinct,
    distinct_places,
    locate,
)
from prefixmem_jax.memory.rounding import round_stochastically
from prefixmem_jax.memory.row_optimizers import scale_by_row_adagrad, scale_by_row_adam
from prefixmem_jax.memory.table import ADDRESSES, Lookup, Table, spread
from prefixmem_jax.parallel.mesh import make_mesh
from prefixmem_jax.parallel.sharding import row_spec

WIDTH = 32
TABLE = Table(rows=4 * 4096, width=WIDTH)
ROWS = TABLE.padded_rows


def addresses_of(kind: str, rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """Adversarial address distributions."""
    if kind == "all equal":
        return np.full(shape, 17)
    if kind == "one owner":
        return rng.integers(0, ROWS // 8, shape)
    if kind == "last owner, distinct":
        return (ROWS - 1 - np.arange(np.prod(shape))).reshape(shape)
    if kind == "all empty":
        return np.full(shape, -1)
    if kind == "half empty":
        return np.where(rng.random(shape) < 0.5, -1, rng.integers(0, ROWS, shape))
    if kind == "skewed":
        return np.minimum(rng.zipf(1.3, shape) - 1, ROWS - 1)
    if kind == "one device busy":
        out = np.full(shape, -1)
        out[-2:] = rng.integers(0, ROWS // 8, (2, *shape[1:]))
        return out
    return rng.integers(0, ROWS, shape)


KINDS = [
    "all equal", "one owner", "last owner, distinct", "all empty", "half empty", "skewed",
    "one device busy", "uniform",
]  # fmt: skip


OPTIMIZERS = {
    "sgd": optax.sgd(0.1),
    "adam": optax.adamw(0.1, weight_decay=0.1),
    "adagrad": optax.chain(scale_by_row_adagrad(), optax.scale(-0.1)),
    "row_adam": optax.chain(scale_by_row_adam(0.9, 0.99), optax.scale(-0.1)),
    "plain_adam": optax.scale_by_adam(),
    "strong_decay": optax.adamw(0.05, weight_decay=0.3),
}


@functools.cache
def mesh_of(devices: int) -> jax.sharding.Mesh:
    shape = (2, 2, 2) if devices == 8 else (devices, 1, 1)  # eight: every axis at once
    return make_mesh(MeshConfig(*shape), jax.devices()[:devices])


@functools.cache
def compiled_step(devices: int, name: str):
    """One update of the table; tests share it."""

    def step(memory, state, addresses, weight, scale):
        fetched = TABLE.fetch(memory, Lookup(addresses))
        read = spread(fetched).by_position

        def loss(rows):
            return jnp.sum(jnp.sin(spread(fetched._replace(rows=rows)).by_position * weight))

        gradients = jax.grad(loss)(fetched.rows)
        merged = TABLE.merge(fetched, gradients)
        memory, state, _ = TABLE.apply(
            memory, state, merged, OPTIMIZERS[name], scale, jax.random.key(0)
        )
        return memory, state, read, merged.squared_norm, fetched.rounds

    return jax.jit(step)


def sharded_steps(devices: int, name: str, addresses_list, weights, scales=None, memory_kind=None):
    """Runs one update per entry of addresses_list on a mesh of that many devices."""
    mesh, step = mesh_of(devices), compiled_step(devices, name)
    scales = [0.5] * len(weights) if scales is None else scales
    with jax.set_mesh(mesh):

        def placed_rows(leaf):
            kind = memory_kind if TABLE.is_per_row(leaf) else None
            lies = NamedSharding(mesh, TABLE.partition(leaf), memory_kind=kind)
            return jax.device_put(leaf, lies)

        memory = placed_rows(initial_rows().reshape(TABLE.shape))
        state = jax.tree.map(placed_rows, TABLE.init_optimizer(OPTIMIZERS[name]))
        out = []
        for addresses, weight, scale in zip(addresses_list, weights, scales, strict=True):
            placed = [
                jax.device_put(x, NamedSharding(mesh, ADDRESSES)) for x in (addresses, weight)
            ]
            memory, state, read, squared, rounds = step(memory, state, *placed, jnp.float32(scale))
            out.append((np.asarray(read), float(squared), int(rounds)))
        for leaf in filter(TABLE.is_per_row, jax.tree.leaves((memory, state))):
            assert leaf.sharding.memory_kind == (memory_kind or "device")
        return by_row(memory), jax.tree.map(by_row, state), out


def initial_rows() -> np.ndarray:
    return np.random.default_rng(1).normal(size=(ROWS, WIDTH)).astype(np.float32)


def by_row(leaf: jax.Array) -> np.ndarray:
    """Lines as rows [ROWS, WIDTH]; other arrays as they are."""
    leaf = np.asarray(leaf)
    return leaf.reshape(ROWS, WIDTH) if leaf.ndim == 2 else leaf


def gather(rows: jax.Array, addresses: np.ndarray) -> jax.Array:
    """The plain gather from rows [ROWS, WIDTH], written without the table's code."""
    return jnp.where(addresses[..., None] < 0, 0, rows[jnp.maximum(addresses, 0)])


@jax.jit
def dense_gradient(memory, addresses, weight):
    """Of the whole table."""
    return jax.grad(lambda memory: jnp.sum(jnp.sin(gather(memory, addresses) * weight)))(memory)


def dense_steps(optimizer: optax.GradientTransformation, addresses_list, weights):
    """The plain reference: gradient of the whole table, update of the touched rows."""
    memory = jnp.asarray(initial_rows())
    state = optimizer.init(memory)
    out = []
    for addresses, weight in zip(addresses_list, weights, strict=True):
        read = gather(memory, addresses)
        gradient = dense_gradient(memory, addresses, weight)
        updates, new_state = optimizer.update(0.5 * gradient, state, memory)
        touched = np.zeros(ROWS, bool)
        touched[np.asarray(addresses)[np.asarray(addresses) >= 0]] = True

        def only_touched(new, old, touched=touched):
            if new.ndim == 0:
                return new
            return jnp.where(touched.reshape(-1, *(1,) * (new.ndim - 1)), new, old)

        memory = only_touched(memory + updates, memory)
        state = jax.tree.map(only_touched, new_state, state)
        out.append((np.asarray(read), float(jnp.sum(gradient**2))))
    return np.asarray(memory), jax.device_get(state), out


def check(
    devices: int, kinds: list[str], seed: int, name: str, memory_kind: str | None = None
) -> list[int]:
    rng = np.random.default_rng(seed)
    shape = (8, 6, 3)
    addresses = [addresses_of(kind, rng, shape).astype(np.int32) for kind in kinds]
    weights = [rng.normal(size=(*shape, WIDTH)).astype(np.float32) for _ in kinds]
    memory, state, out = sharded_steps(devices, name, addresses, weights, None, memory_kind)
    expected_memory, expected_state, expected = dense_steps(OPTIMIZERS[name], addresses, weights)
    for (read, squared, rounds), (expected_read, expected_squared) in zip(
        out, expected, strict=True
    ):
        np.testing.assert_allclose(read, expected_read, rtol=1e-5, atol=1e-7)
        np.testing.assert_allclose(squared, expected_squared, rtol=1e-5)
        assert rounds >= 1
    # A row's gradient is a sum of numbers of order 1, here in another order. Of n of them, partial
    # sums of about sqrt(n) are rounded n times; a twentieth of that is in Adam's moment, twice.
    most = max(np.unique(x[x >= 0], return_counts=True)[1].max(initial=1) for x in addresses)
    close = {"rtol": 1e-5, "atol": max(1e-7, 0.1 * most * 2.0**-24)}
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **close), state, expected_state)
    # Adam's update is a mean gradient over a root of mean squares: where these are small, all of
    # that rounding is. (The others' are scaled by a small rate.)
    rounding = np.full_like(expected_memory, 1e-6)
    if name == "plain_adam":
        root = np.sqrt(expected_state.nu / (1 - 0.999 ** len(kinds)))
        touched = root > 0
        rounding[touched] = np.maximum(1e-6, 10 * close["atol"] / root[touched])
    error = np.abs(memory - expected_memory)
    assert (error <= 1e-5 * np.abs(expected_memory) + rounding).all()
    return [rounds for _, _, rounds in out]


@pytest.mark.parametrize(
    ("devices", "name"),
    [
        *itertools.product((1, 8), ("sgd", "adam", "adagrad", "row_adam")),
        (2, "adam"),
        (4, "row_adam"),
    ],
)
def test_every_distribution_matches_the_dense_reference(devices, name):
    rounds = check(devices, KINDS, 0, name)
    if devices == 8:  # the adversarial ones really overflow one exchange, the rest do not
        by_kind = dict(zip(KINDS, rounds, strict=True))
        assert by_kind["last owner, distinct"] > 1 and by_kind["one device busy"] > 1
        assert by_kind["all equal"] == by_kind["all empty"] == 1


@example(devices=2, kinds=["all equal", "all equal"], seed=374)
@example(devices=2, kinds=["all equal", "skewed"], seed=5)
@settings(max_examples=12, deadline=None)
@given(
    devices=st.sampled_from([1, 2, 4, 8]),
    kinds=st.lists(st.sampled_from(KINDS), min_size=2, max_size=2),
    seed=st.integers(0, 10**6),
)
def test_any_sequence_of_distributions_matches_the_dense_reference(devices, kinds, seed):
    check(devices, kinds, seed, "plain_adam")


@pytest.mark.parametrize("devices, name", [(1, "row_adam"), (8, "adam"), (4, "adagrad")])
def test_rows_in_the_hosts_memory_match_the_dense_reference_too(devices, name):
    rounds = check(devices, KINDS, 5, name, "pinned_host")
    assert (max(rounds) > 1) == (devices > 1)


@pytest.mark.parametrize(
    "devices, name, dtype", [(1, "adam", "float32"), (8, "row_adam", "bfloat16")]
)
def test_fresh_rows_in_the_hosts_memory_are_those_of_the_device(devices, name, dtype):
    table = Table(rows=20_000, width=64, tables=2, dtype=dtype)
    key, mesh = jax.random.key(3), mesh_of(devices)
    expected = jax.jit(table.init)(key), table.init_optimizer(OPTIMIZERS[name])
    with jax.set_mesh(mesh):
        found = jax.jit(lambda key: fresh_rows(table, OPTIMIZERS[name], key))(key)
    assert found[0].sharding.memory_kind == "pinned_host" and found[0].dtype == dtype
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    rounded = {"float32": 1e-6, "bfloat16": 2**-7}[dtype]
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        one, other = np.asarray(one, np.float32), np.asarray(other, np.float32)
        np.testing.assert_allclose(one, other, rtol=rounded, atol=1e-9)


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 3000), st.integers(1, 1000))
def test_a_stretch_of_random_numbers_is_that_of_the_whole(start, count):
    key = jax.random.key(9)
    whole = jax.random.normal(key, (4000,))
    found = normal(key, jnp.array([0, start], jnp.uint32), count)
    np.testing.assert_allclose(found, whole[start : start + count], rtol=1e-6, atol=1e-9)


def test_places_of_random_numbers_carry_into_the_high_word():
    key = jax.random.key(9)
    below, above = (normal(key, jnp.array(at, jnp.uint32), 16) for at in ((0, 2**32 - 8), (1, 0)))
    np.testing.assert_array_equal(below[8:], above[:8])
    assert not np.isin(below[8:], normal(key, jnp.array((0, 0), jnp.uint32), 16)).any()


def test_untouched_rows_and_their_moments_stay_bit_identical():
    addresses = np.arange(144, dtype=np.int32).reshape(8, 6, 3)
    weights = [np.ones((8, 6, 3, WIDTH), np.float32)] * 2
    memory, state, _ = sharded_steps(4, "plain_adam", [addresses, addresses + 1000], weights)
    before = initial_rows()
    untouched = np.ones(ROWS, bool)
    untouched[:144] = untouched[1000:1144] = False
    assert np.array_equal(memory[untouched], before[untouched])
    assert not np.any(memory[~untouched] == before[~untouched])
    assert not state.mu[untouched].any() and not state.nu[untouched].any()
    assert int(state.count) == 2


@pytest.mark.parametrize("devices", [1, 8])
@pytest.mark.parametrize("name", ["sgd", "adam", "adagrad", "row_adam"])
def test_a_scale_that_is_nan_changes_no_bit(devices, name):
    """Whatever the gradients are, and however many exchanges they need."""
    rng = np.random.default_rng(5)
    kinds = ["uniform", "last owner, distinct"]
    addresses = [addresses_of(kind, rng, (8, 6, 3)).astype(np.int32) for kind in kinds]
    weights = [rng.normal(size=(8, 6, 3, WIDTH)).astype(np.float32) for _ in kinds]
    first = sharded_steps(devices, name, addresses[:1], weights[:1])
    weights[1][3:] = np.nan
    both = sharded_steps(devices, name, addresses, weights, [0.5, np.nan])
    assert both[0].tobytes() == first[0].tobytes()
    leaves = zip(jax.tree.leaves(both[1]), jax.tree.leaves(first[1]), strict=True)
    assert all(one.tobytes() == other.tobytes() for one, other in leaves)


def test_the_gathers_of_inference_read_the_same_rows():
    rng = np.random.default_rng(7)
    rows = initial_rows()
    mesh = mesh_of(8)
    exchange = jax.jit(
        jax.shard_map(
            TABLE.gather_by_exchange,
            mesh=mesh,
            in_specs=(row_spec(), row_spec()),  # each device its own addresses
            out_specs=row_spec(),
        )
    )
    sharded = jax.device_put(rows.reshape(TABLE.shape), NamedSharding(mesh, row_spec()))
    on_host = NamedSharding(mesh, row_spec(), memory_kind="pinned_host")
    whole = jnp.asarray(rows.reshape(TABLE.shape))
    for kind in KINDS:
        addresses = addresses_of(kind, rng, (8, 6, 3)).astype(np.int32)
        expected = gather(rows, addresses)
        np.testing.assert_array_equal(TABLE.gather(whole, addresses), expected)
        placed = jax.device_put(addresses, NamedSharding(mesh, row_spec()))
        np.testing.assert_array_equal(exchange(sharded, placed), expected)
        found = exchange(jax.device_put(sharded, on_host), placed)
        np.testing.assert_array_equal(found, expected)


def dense_trajectory(optimizer, gradients):
    """Plain optax on a whole small table, every row in every step."""
    rows = jnp.ones((5, WIDTH))
    state = optimizer.init(rows)
    for gradient in gradients:
        updates, state = optimizer.update(gradient, state, rows)
        rows = optax.apply_updates(rows, updates)
    return np.asarray(rows)


def test_lazy_adamw_is_adamw_on_rows_touched_in_every_step():
    """And not on others: there it leaves out the decay of weights and moments, as documented."""
    optimizer = OPTIMIZERS["strong_decay"]
    rng = np.random.default_rng(0)
    weights = [rng.normal(size=(8, 6, 1, WIDTH)).astype(np.float32) for _ in range(20)]
    addresses = np.arange(48, dtype=np.int32).reshape(8, 6, 1)
    memory, _, _ = sharded_steps(2, "strong_decay", [addresses] * 20, weights)
    initial = initial_rows()
    dense = jnp.asarray(initial)
    state = optimizer.init(dense)
    for weight in weights:
        gradient = 0.5 * dense_gradient(dense, addresses, weight)
        updates, state = optimizer.update(gradient, state, dense)
        dense = optax.apply_updates(dense, updates)
    np.testing.assert_allclose(memory[:48], dense[:48], rtol=1e-4, atol=1e-6)
    assert np.array_equal(memory[48:], initial[48:]) and not np.allclose(dense[48:], initial[48:])


def test_row_wise_moments_by_hand():
    gradients = [np.full((5, WIDTH), 2.0), np.full((5, WIDTH), -4.0)]
    found = dense_trajectory(optax.chain(scale_by_row_adagrad(0), optax.scale(-1.0)), gradients)
    np.testing.assert_allclose(found, 1 - 2 / 2 + 4 / np.sqrt(4 + 16), rtol=1e-6)
    # Where all numbers of a row have one gradient, row-wise Adam is Adam.
    ours = optax.chain(scale_by_row_adam(0.9, 0.99), optax.scale(-0.1))
    adam = optax.chain(optax.scale_by_adam(0.9, 0.99), optax.scale(-0.1))
    np.testing.assert_allclose(
        dense_trajectory(ours, gradients), dense_trajectory(adam, gradients), rtol=1e-6
    )


@settings(max_examples=40, deadline=None)
@given(
    width=st.sampled_from([1, 2, 8, 16, 64, 96, 128, 192]),
    dtype=st.sampled_from(["float32", "bfloat16"]),
    count=st.sampled_from([1, 8, 200]),
    asked=st.sampled_from(["any", "one line", "none"]),
    seed=st.integers(0, 10**6),
)
def test_reading_and_writing_whole_lines_is_reading_and_writing_rows(
    width, dtype, count, asked, seed
):
    """What TPUs do, against what the others do (which the tests above compare with NumPy)."""
    rng = np.random.default_rng(seed)
    pack = lines.rows_per_line(width)
    rows = 5 * pack
    memory = jnp.asarray(rng.normal(size=(5, pack * width)), dtype)
    first, end = {"any": (0, 2 * rows), "one line": (pack, 2 * pack), "none": (rows, 2 * rows)}[
        asked
    ]
    ids = np.unique(np.minimum(rng.integers(first, end, count), rows))
    ids = jnp.asarray(np.pad(ids, (0, count - len(ids)), constant_values=rows), jnp.int32)
    values = jnp.asarray(rng.normal(size=(count, width)), dtype)
    by_line, by_row = (
        jax.jit(functools.partial(read, width=width))
        for read in (lines.read_by_line, lines.read_by_row)
    )
    np.testing.assert_array_equal(by_line(memory, ids), by_row(memory, ids))
    by_line, by_row = (jax.jit(write) for write in (lines.write_by_line, lines.write_by_row))
    np.testing.assert_array_equal(by_line(memory, ids, values), by_row(memory, ids, values))


def test_bfloat16_rows_are_rounded_so_that_small_updates_add_up():
    """And on any number of devices alike."""
    table = Table(rows=4096, width=128, dtype="bfloat16")
    addresses = np.arange(48, dtype=np.int32).reshape(8, 6, 1)
    found = []
    for devices in (1, 4):
        mesh = make_mesh(MeshConfig(), jax.devices()[:devices])

        def touched(places, rows=table.padded_rows // devices):
            return places.owner * rows + places.row < 48

        with jax.set_mesh(mesh):
            memory = jax.device_put(
                jnp.ones(table.shape, jnp.bfloat16), NamedSharding(mesh, row_spec())
            )
            placed = jax.device_put(addresses, NamedSharding(mesh, ADDRESSES))

            @jax.jit
            def step(memory, addresses, key):
                fetched = table.fetch(memory, Lookup(addresses))
                gradients = jnp.where(touched(fetched.places)[:, None], 1.0, 0.0) + 0 * fetched.rows
                merged = table.merge(fetched, gradients)
                optimizer = optax.sgd(1e-4)
                state = table.init_optimizer(optimizer)
                return table.apply(memory, state, merged, optimizer, jnp.float32(1), key)[0]

            for number in range(200):
                memory = step(memory, placed, jax.random.key(number))
        found.append(np.asarray(memory, np.float32))
    assert np.array_equal(found[0], found[1])
    # 200 steps of 1e-4; rounding to nearest, 1/256 below 1, would have stayed at 1.
    assert abs(found[0][:48].mean() - 0.98) < 2e-4
    assert np.array_equal(found[0][48:], np.ones_like(found[0][48:]))


def test_stochastic_rounding_gives_one_of_the_two_neighbours_and_keeps_the_mean():
    values = jnp.full((4000, 4), 1 + 0.3 / 128, jnp.float32)
    rounded = round_stochastically(values, jnp.arange(4000), jax.random.key(3))
    rounded = np.asarray(rounded, np.float64)
    assert set(np.unique(rounded)) == {1.0, 1 + 1 / 128}
    assert abs((rounded > 1).mean() - 0.3) < 0.015
    exact = jnp.asarray([[1.0, -2.5, 0.0, np.inf]])
    again = round_stochastically(exact, jnp.arange(1), jax.random.key(3))
    assert np.array_equal(np.asarray(again, np.float32), exact)


@pytest.mark.parametrize("kind", ["uniform", "few", "none"])
@pytest.mark.parametrize("most", [600, 300])
def test_all_ways_to_find_distinct_rows_agree_with_numpy(kind, most):
    rng = np.random.default_rng(0)
    highest = {"uniform": 250, "few": 7, "none": 1}[kind]
    numbers = rng.integers(0, highest, 600) - (kind == "none")
    numbers[rng.random(600) < 0.3] = -1
    named, expected = numbers >= 0, np.unique(numbers[numbers >= 0])
    padding = most - len(expected)
    flat = jnp.asarray(np.where(named, numbers, 1000), jnp.int32)
    places = Place(*(jnp.where(named, x, none) for x, none in ((flat // 50, 20), (flat % 50, 50))))
    (by_one_word,), in_one_word = _by_sorting(flat, nothing=(1000,), most=most)
    words, by_words = _by_sorting(*places, nothing=(20, 50), most=most)
    found, by_place = jax.jit(lambda x: distinct_places(x, 20, 50, most))(places)
    for ids, index in (
        (by_one_word, in_one_word),
        _by_search(flat, nothing=1000, most=most),
        jax.jit(lambda x: distinct(x, 1000, most))(flat),
        (words[0] * 50 + words[1] - 50 * (words[0] == 20), by_words),
        (found.owner * 50 + found.row - 50 * (found.owner == 20), by_place),
    ):
        assert list(np.asarray(ids)) == [*expected, *[1000] * padding]
        np.testing.assert_array_equal(ids[index[named]], numbers[named])
    assert (np.asarray(by_place)[~named] == most).all()


@settings(max_examples=100, deadline=None)
@given(
    tables=st.sampled_from([1, 5, 16, 40]),
    devices=st.sampled_from([1, 2, 8, 256, 4096]),
    rows_per_device=st.one_of(st.integers(1, 50), st.integers(2**31 - 50, 2**31 - 1)),
    data=st.data(),
)
def test_rows_are_located_as_pythons_integers_say(tables, devices, rows_per_device, data):
    rows = min(devices * rows_per_device // tables, 2**31 - 1)
    address = data.draw(
        st.lists(st.integers(-1, max(0, rows - 1)), min_size=tables, max_size=tables)
    )
    address = [i if i < rows else -1 for i in address]
    found = locate(jnp.asarray([address], jnp.int32), tables, devices, rows_per_device)
    for column, i in enumerate(address):
        expected = divmod(i * tables + column, rows_per_device)
        expected = expected if i >= 0 else (devices, rows_per_device)
        assert (found.owner[0, column], found.row[0, column]) == expected


@pytest.mark.parametrize("devices", [1, 8])
def test_larger_memories_match_the_dense_reference_too(devices, monkeypatch):
    """Their rows are sorted by two words; those of the other tests by one."""
    monkeypatch.setattr("prefixmem_jax.memory.places.ONE_WORD", 0)
    compiled_step.cache_clear()
    check(devices, KINDS, 1, "row_adam")
    compiled_step.cache_clear()


def test_a_device_has_fewer_rows_than_an_int32_counts():
    table = Table(rows=2**31 - 1, width=1, tables=16, dtype="bfloat16")
    addresses = Lookup(jnp.zeros((8, 6, 16), jnp.int32))
    lies = NamedSharding(mesh_of(8), row_spec())
    memory = jax.ShapeDtypeStruct(table.shape, jnp.bfloat16, sharding=lies)
    with jax.set_mesh(mesh_of(8)), pytest.raises(UserError, match="a device on 8; expected fewer"):
        jax.eval_shape(table.fetch, memory, addresses)


@pytest.mark.parametrize("devices", [3, 6, 12, 5])
def test_rows_for_a_number_of_devices_that_is_no_power_of_two(devices):
    table = Table(rows=2_000_000, width=16, tables=16)
    with pytest.raises(UserError, match=f"do not divide by {devices} devices; expected ") as error:
        table.rows_per_device(devices)
    expected = int(str(error.value).partition("expected ")[2].split(",")[0])
    assert table.rows < expected < 1.02 * table.rows
    other = dataclasses.replace(table, rows=expected)
    assert other.rows_per_device(devices) * devices == other.padded_rows
    with pytest.raises(UserError):
        dataclasses.replace(table, rows=expected + 1).rows_per_device(devices)
