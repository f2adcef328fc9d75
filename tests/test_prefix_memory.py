"""PrefixMem against the paper's formula, and its behaviour at document borders and in decoding."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import real_data
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from test_hashing import reference_addresses, row_numbers

from prefixmem_jax.config_groups import DataConfig, MeshConfig
from prefixmem_jax.data.documents.document import Corpus
from prefixmem_jax.data.prepare import prepare_data
from prefixmem_jax.errors import UserError
from prefixmem_jax.memory import hashing
from prefixmem_jax.memory.exchange import capacity
from prefixmem_jax.objectives.next_token import NextToken
from prefixmem_jax.parallel.mesh import make_mesh
from prefixmem_jax.parallel.sharding import batch_sharding
from prefixmem_jax.semantic_ids.space import SidSpace
from prefixmem_jax.semantic_ids.vocabulary import Vocabulary
from prefixmem_jax.sid_encoders.prefix_memory import PrefixMemoryConfig

SPACE = SidSpace((7, 9, 5, 11))
VOCABULARY = Vocabulary(SPACE)


class Memory:
    """A SID encoder with its rows, whole on one device."""

    def __init__(self, address="prefix", targets=(3, 4), orders=3, items=0):
        self.config = PrefixMemoryConfig(
            target_levels=targets, orders=orders, items=items, heads=2, rows=97, d_mem=8,
            address=address,
        )  # fmt: skip
        self.sid_encoder = self.config.build(VOCABULARY, 6, 1.0, nnx.Rngs(0))
        self.table = self.config.table(SPACE)
        self.rows = self.table.init(jax.random.key(1))
        self._vectors = jax.jit(self._trace_vectors, static_argnames="last")

    def vectors(self, tokens, segments, last=None):
        return np.asarray(self._vectors(jnp.asarray(tokens), jnp.asarray(segments), last))

    def _trace_vectors(self, tokens, segments, last):
        rows = self.table.gather(self.rows, self.sid_encoder.addresses(tokens, segments, last))
        return self.sid_encoder(tokens, segments, rows, last)

    def formula(self, prefix, items=None):
        """m_l = W_out @ sum_n concat_h E[n,h][idx[n,h]], with E[n,h] out of the one array."""
        config = self.config
        addresses = reference_addresses(
            prefix,
            config.multipliers(SPACE),
            scheme=config.address,
            orders=config.orders,
            rows=config.rows,
            items=items,
            count=config.items,
        )
        addresses = row_numbers(addresses, config.tables)
        total = np.zeros(config.d_mem)
        rows = np.asarray(self.rows).reshape(-1, config.d_mem // config.heads)
        for n in range(len(addresses) // config.heads):
            read = addresses[n * config.heads : (n + 1) * config.heads]
            if (read >= 0).all():
                total += np.concatenate([rows[row] for row in read])
        return total @ np.asarray(self.sid_encoder.projection[...]).reshape(config.d_mem, -1)


def random_sids(items, seed):
    rng = np.random.default_rng(seed)
    return np.stack([rng.integers(0, size, items) for size in SPACE.codebook_sizes], axis=1)


@pytest.mark.parametrize("address", hashing.SCHEMES)
@pytest.mark.parametrize("targets, items", [((3, 4), 0), ((1, 3, 4), 0), ((1, 2, 4), 2)])
def test_vectors_follow_the_formula_and_are_zero_elsewhere(address, targets, items):
    memory = Memory(address, targets, items=items)
    sids = random_sids(5, 0)
    tokens = np.concatenate([[VOCABULARY.bos_token], VOCABULARY.encode(sids).reshape(-1)])[None]
    computed = memory.vectors(tokens, np.ones_like(tokens))
    active = np.asarray(memory.sid_encoder.active(jnp.asarray(tokens), jnp.ones_like(tokens)))
    for item in range(5):
        for level in range(1, 5):
            at = 4 * item + level
            assert active[0, at] == (level % 4 + 1 in memory.config.target_levels)
            if active[0, at]:
                expected = memory.formula(sids[item, :level], sids[: item + level // 4])
                np.testing.assert_allclose(computed[0, at], expected, rtol=1e-5, atol=1e-6)
                assert np.abs(computed[0, at]).max() > 0
    assert not active[0, 0] and not computed[~active].any()


def test_ngrams_do_not_cross_packed_documents_or_broken_items():
    memory = Memory()
    sid = VOCABULARY.encode(np.array([1, 2, 3, 4]))
    tokens = np.array([[*sid, sid[0], sid[1], sid[2], 0], [sid[0], sid[1], *sid[1:], 0, 0, 0]])
    together = np.array([[1, 1, 1, 1, 1, 1, 1, 0], [1, 1, 1, 1, 1, 0, 0, 0]])
    apart = np.array([[1, 1, 1, 1, 1, 2, 2, 0], [1, 1, 1, 1, 1, 0, 0, 0]])
    whole, cut = (memory.vectors(tokens, segments) for segments in (together, apart))
    np.testing.assert_array_equal(whole[0, :3], whole[0, 4:7])  # the same prefix, the same vector
    assert whole[0, 5].any() and not cut[0, 5:].any()  # c_1 lies in another document
    assert whole[1, 1].any() and not whole[1, 2:].any()  # c_1 c_2 c_2 c_3: no item


def test_items_count_only_where_they_stand_whole_and_in_a_row():
    memory = Memory(targets=(1, 2), items=1, orders=1)
    bos, (one, two) = VOCABULARY.bos_token, VOCABULARY.encode(random_sids(2, 4))

    def last(*tokens, segments=None):
        segments = [1] * len(tokens) if segments is None else segments
        missing = 9 - len(tokens)  # of one length: each is compiled
        return memory.vectors(*(np.pad([x], ((0, 0), (missing, 0))) for x in (tokens, segments)))[
            0, -1
        ]

    after_item = last(bos, *one, two[0])
    alone = last(bos, two[0])
    assert np.abs(after_item - alone).max() > 0.1
    np.testing.assert_array_equal(last(*two, *one, two[0]), after_item)  # one item is looked at
    for broken in (
        last(bos, *one[:3], two[0]),
        last(*one, bos, two[0]),
        last(*one, two[0], segments=[1, 1, 1, 1, 2]),
        last(one[0], one[2], one[1], one[3], two[0]),
    ):
        np.testing.assert_array_equal(broken, alone)


@pytest.mark.parametrize("items", [0, 2])
@pytest.mark.parametrize("address", hashing.SCHEMES)
def test_the_last_tokens_are_enough_for_decoding(address, items):
    memory = Memory(address, (1, 3, 4) if items else (3, 4), items=items)
    tokens = VOCABULARY.encode(random_sids(4, 2)).reshape(1, -1)
    segments = np.ones_like(tokens)
    whole = memory.vectors(tokens, segments)
    window = memory.sid_encoder.reach + 1
    for at in range(window - 1, tokens.shape[1]):
        newest = tokens[:, at - window + 1 : at + 1]
        ones = np.ones_like(newest)
        # Without what came before them, in a product of the same shape.
        there = np.zeros_like(segments)
        there[:, at - window + 1 : at + 1] = 1
        vectors = memory.vectors(np.where(there, tokens, 0), there)
        np.testing.assert_array_equal(vectors[0, at], whole[0, at])
        # One position alone is the same product in another shape, so not to the last bit.
        alone = memory.vectors(newest, ones, last=1)
        assert alone.shape == (1, 1, 6)
        np.testing.assert_allclose(alone[0, 0], whole[0, at], rtol=1e-5, atol=1e-6)


def test_rows_and_tables_have_the_papers_sizes():
    paper = PrefixMemoryConfig()
    assert paper.tables == 16 and paper.row_width == 64
    rows = paper.table(SidSpace((2048,) * 5)).padded_rows
    assert 2.0e9 < rows * 64 < 2.1e9  # "about 2B table parameters"


def test_sizes_that_do_not_fit_the_sids_are_refused():
    PrefixMemoryConfig(target_levels=(3, 4), orders=3).check(SPACE)
    for changes, words in (
        ({"target_levels": (4, 5), "orders": 3}, "level 5 is outside 1..4"),
        ({"target_levels": (3,), "orders": 3}, "longest prefix"),
        ({"target_levels": (1, 2), "orders": 5}, "longest prefix"),
        ({"target_levels": ()}, "empty"),
        ({"target_levels": (4,), "orders": 3, "rows": 2**31}, "2^31"),
    ):
        with pytest.raises(UserError, match=words.replace("^", r"\^")):
            PrefixMemoryConfig(**changes).check(SPACE)


@pytest.mark.parametrize("name", ["beauty", "microlens", "amazon180k"])
def test_real_batches_need_one_exchange_even_on_256_devices(name):
    """No device asks an owner for more rows than one exchange holds: 4 rows of 1024 tokens each."""
    options = DataConfig(path=str(real_data(name)), max_items=32, sequence_length=1024)
    data = prepare_data(options)
    space = data.vocabulary.space
    levels, devices = space.levels, 256
    config = PrefixMemoryConfig(
        target_levels=(levels - 1, levels), orders=levels - 1, rows=5_000_000
    )
    sid_encoder, table = config.build(data.vocabulary, 8, 1.0, nnx.Rngs(0)), config.table(space)
    rows = NextToken().training_rows(Corpus(data, options), seed=0)
    addresses_of = jax.jit(sid_encoder.addresses)
    largest = []
    for start in range(0, 200, 4):
        part = slice(start, start + 4)
        addresses = np.asarray(addresses_of(rows.tokens[part], rows.segment_ids[part]))
        numbers = row_numbers(addresses, table.tables)
        distinct = np.unique(numbers[numbers >= 0])
        largest.append(np.bincount(distinct // (table.padded_rows // devices)).max())
    room = capacity(addresses.size, table.density, devices)
    assert 0.5 * room < max(largest) <= 0.8 * room


@settings(max_examples=10, deadline=None)
@given(
    address=st.sampled_from(hashing.SCHEMES),
    targets=st.sets(st.integers(1, 4), min_size=1),
    items=st.integers(0, 2),
    seed=st.integers(0, 2**20),
    shares=st.sampled_from([1, 2, 4]),
)
def test_there_is_room_for_what_any_tokens_look_up(address, targets, items, seed, shares):
    """Whole items, items that end early, and stretches of several devices that begin within one:
    every active position is looked up, and no device names more rows than a step computes with.
    """
    longest = max(level - 1 or 4 for level in targets)
    config = PrefixMemoryConfig(
        target_levels=tuple(sorted(targets)), orders=longest, items=items, heads=2, rows=10_007,
        d_mem=8, address=address,
    )  # fmt: skip
    rng = np.random.default_rng(seed)
    tokens, length = [], 60
    while len(tokens) < length:  # runs of the first codes of items
        tokens += list(VOCABULARY.encode(random_sids(1, rng.integers(2**30)))[0])[: rng.integers(5)]
    tokens = np.array(tokens)[None, :length]
    ones = np.ones_like(tokens)
    encoder, table = config.build(VOCABULARY, 6, 1.0, nnx.Rngs(0)), config.table(SPACE)
    wanted = jax.jit(partial(encoder.addresses, last=length))(tokens, ones)
    wanted = np.asarray(wanted)
    mesh = make_mesh(MeshConfig(tensor=shares), jax.devices()[:shares])
    with jax.set_mesh(mesh):
        batch = jax.device_put((tokens, ones), batch_sharding(mesh))
        found = np.asarray(jax.jit(encoder.addresses)(*batch))
    active = (wanted >= 0).any(-1)
    assert sorted(map(tuple, wanted[active])) == sorted(map(tuple, found[(found >= 0).any(-1)]))
    for part in np.split(row_numbers(found, table.tables), shares, axis=1):
        named = len(np.unique(part[part >= 0]))
        assert named <= table.most_distinct * part.size + (table.most_cut if shares > 1 else 0)


def test_the_room_is_what_the_hungriest_tokens_need():
    """Items that end at their longest active position, over and over: all rows of each."""
    config = PrefixMemoryConfig(target_levels=(3, 4), orders=3, heads=2, rows=2**20, d_mem=8)
    space = SidSpace((256, 256, 256, 256))
    vocabulary = Vocabulary(space)
    rng = np.random.default_rng(0)
    sids = rng.integers(0, 256, (20, 4))
    tokens = vocabulary.encode(sids)[:, :3].reshape(1, -1)
    encoder, table = config.build(vocabulary, 6, 1.0, nnx.Rngs(0)), config.table(space)
    addresses = row_numbers(encoder.addresses(tokens, np.ones_like(tokens)), table.tables)
    assert addresses.shape[1] == 2 / 3 * tokens.size  # those of two codes and of three
    named = len(np.unique(addresses[addresses >= 0]))
    assert 0.95 < named / (table.most_distinct * addresses.size) <= 1
    assert table.density * addresses[..., 0].size == pytest.approx(6 / (4 * 6) * tokens.size)
