"""PrefixMem against the paper's formula, and its behaviour at document borders and in decoding."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import real_data
from flax import nnx

from prefixmem_jax.config import DataConfig, PrefixMemoryConfig
from prefixmem_jax.data.prepare import prepare_data
from prefixmem_jax.data.sequences import pack_training_rows
from prefixmem_jax.errors import UserError
from prefixmem_jax.memory import hashing
from prefixmem_jax.sid_encoders.prefix_memory import PrefixMemory, check_encoder, make_table, tables_of
from prefixmem_jax.memory.exchange import capacity
from prefixmem_jax.semantic_ids.space import SidSpace

SPACE = SidSpace((7, 9, 5, 11))


def make(address="prefix", targets=(3, 4), orders=3):
    config = PrefixMemoryConfig(
        target_levels=targets, orders=orders, heads=2, rows=97, d_mem=8, address=address
    )
    encoder = PrefixMemory(config, SPACE, 6, 1.0, rngs=nnx.Rngs(0))
    return config, encoder, encoder.table.init(jax.random.key(1))


def vectors(encoder, memory, tokens, segments):
    addresses = encoder.addresses(jnp.asarray(tokens), jnp.asarray(segments))
    return np.asarray(encoder(encoder.table.lookup(memory, addresses)))


def formula(config, encoder, memory, prefix):
    """m_l = W_out @ sum_n concat_h E[n,h][idx[n,h]], with E[n,h] taken out of the one array."""
    multipliers = hashing.make_multipliers(config.seed, SPACE.levels, config.heads)
    addresses = hashing.reference_addresses(
        prefix, multipliers, scheme=config.address, orders=config.orders, rows=config.rows
    )
    total = np.zeros(config.d_mem)
    rows = np.asarray(memory).reshape(-1, config.d_mem // config.heads)
    for n in range(len(addresses) // config.heads):
        read = addresses[n * config.heads : (n + 1) * config.heads]
        if (read >= 0).all():
            total += np.concatenate([rows[row] for row in read])
    return total @ np.asarray(encoder.projection[...]).reshape(config.d_mem, -1)


@pytest.mark.parametrize("address", hashing.SCHEMES)
def test_vectors_follow_the_formula_and_are_zero_elsewhere(address):
    config, encoder, memory = make(address)
    rng = np.random.default_rng(0)
    sids = np.stack([rng.integers(0, k, 5) for k in SPACE.codebook_sizes], axis=1)
    tokens = np.concatenate([[SPACE.bos_token], SPACE.encode(sids).reshape(-1)])[None]
    found = vectors(encoder, memory, tokens, np.ones_like(tokens))
    for item in range(5):
        for level in range(1, 5):
            got = found[0, 4 * item + level]
            if level + 1 in config.target_levels:
                expected = formula(config, encoder, memory, sids[item, :level])
                np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)
                assert np.abs(got).max() > 0
            else:
                assert not got.any()
    assert not found[0, 0].any()


def test_ngrams_do_not_cross_packed_documents_or_broken_items():
    _, encoder, memory = make()
    sid = SPACE.encode(np.array([1, 2, 3, 4]))
    tokens = np.array([[*sid, sid[0], sid[1], sid[2], 0], [sid[0], sid[1], *sid[1:], 0, 0, 0]])
    together = np.array([[1, 1, 1, 1, 1, 1, 1, 0], [1, 1, 1, 1, 1, 0, 0, 0]])
    apart = np.array([[1, 1, 1, 1, 1, 2, 2, 0], [1, 1, 1, 1, 1, 0, 0, 0]])
    whole, cut = (vectors(encoder, memory, tokens, s) for s in (together, apart))
    np.testing.assert_array_equal(whole[0, :3], whole[0, 4:7])  # the same prefix, the same vector
    assert whole[0, 5].any() and not cut[0, 5:].any()  # c_1 lies in another document
    assert whole[1, 1].any() and not whole[1, 2:].any()  # c_1 c_2 c_2 c_3: no item


@pytest.mark.parametrize("address", hashing.SCHEMES)
def test_the_last_tokens_are_enough_for_decoding(address):
    _, encoder, memory = make(address)
    rng = np.random.default_rng(2)
    sids = np.stack([rng.integers(0, k, 4) for k in SPACE.codebook_sizes], axis=1)
    tokens = SPACE.encode(sids).reshape(1, -1)
    whole = vectors(encoder, memory, tokens, np.ones_like(tokens))
    window = SPACE.levels - 1
    for at in range(window - 1, tokens.shape[1]):
        last = tokens[:, at - window + 1 : at + 1]
        np.testing.assert_array_equal(
            vectors(encoder, memory, last, np.ones_like(last))[0, -1], whole[0, at]
        )


def test_rows_and_tables_have_the_papers_sizes():
    paper = PrefixMemoryConfig()
    assert tables_of(paper) == 16 and paper.d_mem // paper.heads == 64
    rows = make_table(paper, SidSpace((2048,) * 5)).padded_rows
    assert 2.0e9 < rows * 64 < 2.1e9  # "about 2B table parameters"


def test_sizes_that_do_not_fit_the_sids_are_refused():
    check_encoder(PrefixMemoryConfig(target_levels=(3, 4), orders=3), SPACE)
    for changes, words in (
        ({"target_levels": (4, 5), "orders": 3}, "level 5 is outside 2..4"),
        ({"target_levels": (3,), "orders": 3}, "longest prefix"),
        ({"target_levels": ()}, "empty"),
        ({"target_levels": (4,), "orders": 3, "rows": 2**30}, "2^31"),
    ):
        with pytest.raises(UserError, match=words.replace("^", r"\^")):
            check_encoder(PrefixMemoryConfig(**changes), SPACE)


@pytest.mark.parametrize("name", ["beauty", "microlens", "amazon180k"])
def test_real_batches_need_one_exchange_even_on_256_devices(name):
    """No device asks an owner for more rows than one exchange holds: 4 rows of 1024 tokens each."""
    data = prepare_data(DataConfig(path=str(real_data(name))))
    space = data.catalog.space
    levels, devices = space.levels, 256
    config = PrefixMemoryConfig(
        target_levels=(levels - 1, levels), orders=levels - 1, rows=5_000_000
    )
    encoder = PrefixMemory(config, space, 8, 1.0, rngs=nnx.Rngs(0))
    rows = pack_training_rows(data.catalog, data.split.train, 1024, 32, seed=0)
    addresses_of = jax.jit(encoder.addresses)
    largest = []
    for start in range(0, 200, 4):
        part = slice(start, start + 4)
        addresses = np.asarray(addresses_of(rows["tokens"][part], rows["segment_ids"][part]))
        distinct = np.unique(addresses[addresses >= 0])
        largest.append(np.bincount(distinct // (encoder.table.padded_rows // devices)).max())
    room = capacity(addresses.size, encoder.table.density, devices)
    assert 0.5 * room < max(largest) <= 0.8 * room
