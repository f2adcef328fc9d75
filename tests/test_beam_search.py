"""Beam search against brute force: every candidate scored by whole forward passes."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from prefixmem_jax.config import DecoderConfig, PrefixMemoryConfig
from prefixmem_jax.data.sequences import prompt_rows
from prefixmem_jax.decoding.beam_search import beam_search
from prefixmem_jax.models.sid_lm import SidLM
from prefixmem_jax.semantic_ids.catalog import Catalog
from prefixmem_jax.semantic_ids.space import SidSpace
from prefixmem_jax.semantic_ids.trie import Trie

DECODER = DecoderConfig(
    layers=2, d_model=24, d_ff=32, query_heads=4, kv_heads=2, head_dim=8, init_std=0.3
)


def make(sizes, items, with_encoder, seed):
    space = SidSpace(sizes)
    rng = np.random.default_rng(seed)
    sids = np.stack([rng.integers(0, size, items) for size in sizes], axis=1)
    catalog = Catalog(sids, [None] * items, space)
    encoder = memory = None
    if with_encoder:
        levels = space.levels
        encoder = PrefixMemoryConfig(
            target_levels=tuple(range(2, levels + 1)), orders=levels - 1, heads=2, rows=64, d_mem=8
        )
    model = SidLM(DECODER, encoder, space, rngs=nnx.Rngs(seed))
    if with_encoder:  # strong enough to change every ranking
        memory = 20 * model.encoder.table.init(jax.random.key(seed))
        model.encoder.projection[...] = 100 * model.encoder.projection[...]
    return model, memory, catalog, rng


def brute_force(model, memory, catalog, history, candidates):
    """Log-probability of each candidate SID [n, levels] after a history, without any cache."""
    space = model.space
    prompt = prompt_rows(catalog, [history], len(history))["tokens"][0]
    tokens = np.concatenate(
        [np.tile(prompt, (len(candidates), 1)), space.encode(candidates)], axis=1
    )
    positions = np.tile(np.arange(tokens.shape[1]), (len(tokens), 1))
    ones = jnp.ones_like(tokens)
    rows = None
    if memory is not None:
        rows = model.encoder.table.lookup(
            memory, model.encoder.addresses(jnp.asarray(tokens), ones)
        )
    logits = np.asarray(model.next_token_logits(jnp.asarray(tokens), ones, positions, rows))
    total = np.zeros(len(candidates))
    for level in range(1, space.levels + 1):
        at = logits[:, len(prompt) + level - 2, slice(*space.token_range(level))]
        at = at - np.log(np.exp(at).sum(axis=1, keepdims=True))
        total += at[np.arange(len(candidates)), candidates[:, level - 1]]
    return total


@settings(max_examples=10, deadline=None)
@given(
    sizes=st.sampled_from([(3, 4), (4, 3, 5), (2, 3, 2, 3)]),
    items=st.integers(1, 30),
    with_encoder=st.booleans(),
    constrained=st.booleans(),
    lengths=st.lists(st.integers(1, 4), min_size=1, max_size=3),
    seed=st.integers(0, 1000),
)
def test_wide_beams_equal_scoring_everything(
    sizes, items, with_encoder, constrained, lengths, seed
):
    model, memory, catalog, rng = make(sizes, items, with_encoder, seed)
    everything = np.array(list(itertools.product(*(range(size) for size in sizes))), np.int32)
    candidates = catalog.group_sids if constrained else everything
    histories = [rng.integers(0, items, length) for length in lengths]
    beams = len(everything)  # wide enough that nothing is ever cut off
    prompts = {k: jnp.asarray(v) for k, v in prompt_rows(catalog, histories, 4).items()}
    trie = Trie(catalog) if constrained else None
    found = jax.jit(lambda p: beam_search(model, memory, p, beams, trie))(prompts)
    for user, history in enumerate(histories):
        expected = brute_force(model, memory, catalog, history, candidates)
        order = np.argsort(-expected, kind="stable")
        count = len(candidates)
        np.testing.assert_allclose(
            found.scores[user, :count], expected[order], rtol=1e-5, atol=2e-5
        )
        by_sid = {tuple(sid): score for sid, score in zip(candidates, expected, strict=True)}
        sids = [tuple(sid) for sid in np.asarray(found.codes[user, :count]).tolist()]
        assert len(set(sids)) == count  # all distinct, and each with its own score
        for sid, score in zip(sids, np.asarray(found.scores[user]), strict=False):
            assert abs(by_sid[sid] - score) < 2e-5 * max(1, abs(score))
        assert np.isneginf(found.scores[user, count:]).all()
        assert (np.asarray(found.codes[user, count:]) == -1).all()


@pytest.mark.parametrize("with_encoder", [False, True])
def test_narrow_beams_are_valid_distinct_and_keep_the_best_prefixes(with_encoder):
    model, memory, catalog, rng = make((5, 4, 6), 40, with_encoder, 3)
    histories = [rng.integers(0, 40, 3), rng.integers(0, 40, 1)]
    prompts = {k: jnp.asarray(v) for k, v in prompt_rows(catalog, histories, 4).items()}
    found = beam_search(model, memory, prompts, 6, Trie(catalog))
    for user, history in enumerate(histories):
        sids = np.asarray(found.codes[user])
        assert len({tuple(sid) for sid in sids.tolist()}) == 6
        assert all(catalog.group(sid) >= 0 for sid in sids)
        scores = np.asarray(found.scores[user])
        assert (np.diff(scores) <= 0).all()
        np.testing.assert_allclose(
            scores, brute_force(model, memory, catalog, history, sids), rtol=1e-5, atol=2e-5
        )


def test_a_user_is_decoded_the_same_in_any_batch():
    model, memory, catalog, rng = make((5, 4, 6), 40, True, 4)
    histories = [rng.integers(0, 40, length) for length in (4, 1, 3)]

    def search(chosen):
        rows = prompt_rows(catalog, chosen, 4)
        return beam_search(
            model, memory, {k: jnp.asarray(v) for k, v in rows.items()}, 5, Trie(catalog)
        )

    together = search(histories)
    for user, history in enumerate(histories):
        alone = search([history])
        assert np.array_equal(alone.codes[0], together.codes[user])
        np.testing.assert_allclose(alone.scores[0], together.scores[user], rtol=1e-5, atol=1e-5)
