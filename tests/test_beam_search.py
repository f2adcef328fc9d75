"""Beam search against brute force: every candidate scored by whole forward passes."""

import dataclasses
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import real_data
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from prefixmem_jax.config import DecoderConfig, PrefixMemoryConfig
from prefixmem_jax.data.formats.parquet import load_dataset
from prefixmem_jax.data.sequences import prompt_rows
from prefixmem_jax.inference.beam_search import beam_search
from prefixmem_jax.inference.cached_sid_lm import CachedSidLM
from prefixmem_jax.models.sid_lm import SidLM
from prefixmem_jax.semantic_ids.catalog import Catalog
from prefixmem_jax.semantic_ids.space import SidSpace

DECODER = DecoderConfig(
    layers=2, d_model=24, d_ff=32, query_heads=4, kv_heads=2, head_dim=8, init_std=0.3
)
FAMILIES = {
    "qwen3": DECODER,
    "llama": dataclasses.replace(DECODER, qk_norm=False, kv_heads=1),
    # A window shorter than a SID: a beam's own tokens leave it too.
    "gemma3": dataclasses.replace(
        DECODER,
        activation="gelu_tanh",
        norm_plus_one=True,
        post_norms=True,
        query_scale=0.25,
        scale_embedding=True,
        logit_softcap=5.0,
        tied_embeddings=True,
        sliding_layers=(0,),
        sliding_window=2,
    ),
}


def make(sizes, items, with_encoder, seed, decoder=DECODER):
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
    model = SidLM(decoder, encoder, space, rngs=nnx.Rngs(seed))
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
    logits = jax.jit(lambda *arrays: model.next_token_logits(*arrays))(
        jnp.asarray(tokens), ones, positions, rows
    )
    logits = np.asarray(logits)
    total = np.zeros(len(candidates))
    for level in range(1, space.levels + 1):
        at = logits[:, len(prompt) + level - 2, slice(*space.token_range(level))]
        at = at - np.log(np.exp(at).sum(axis=1, keepdims=True))
        total += at[np.arange(len(candidates)), candidates[:, level - 1]]
    return total


@settings(max_examples=5, deadline=None)
@given(
    sizes=st.sampled_from([(3, 4), (4, 3, 5), (2, 3, 2, 3)]),
    items=st.integers(1, 30),
    with_encoder=st.booleans(),
    constrained=st.booleans(),
    lengths=st.lists(st.integers(1, 4), min_size=1, max_size=3),
    family=st.sampled_from(sorted(FAMILIES)),
    seed=st.integers(0, 1000),
)
def test_wide_beams_equal_scoring_everything(
    sizes, items, with_encoder, constrained, lengths, family, seed
):
    model, memory, catalog, rng = make(sizes, items, with_encoder, seed, FAMILIES[family])
    everything = np.array(list(itertools.product(*(range(size) for size in sizes))), np.int32)
    candidates = catalog.group_sids if constrained else everything
    histories = [rng.integers(0, items, length) for length in lengths]
    beams = len(everything)  # wide enough that nothing is ever cut off
    prompts = {k: jnp.asarray(v) for k, v in prompt_rows(catalog, histories, 4).items()}
    trie = catalog.trie.levels if constrained else None
    cached = CachedSidLM(model, memory)
    found = jax.jit(lambda p: beam_search(cached, p, beams, trie))(prompts)
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


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_equals_scoring_everything(family):
    model, memory, catalog, rng = make((4, 3, 5), 25, True, 5, FAMILIES[family])
    histories = [rng.integers(0, 25, length) for length in (4, 1)]
    prompts = {k: jnp.asarray(v) for k, v in prompt_rows(catalog, histories, 4).items()}
    candidates = catalog.group_sids
    search = jax.jit(lambda p: beam_search(CachedSidLM(model, memory), p, 25, catalog.trie.levels))
    found = search(prompts)
    for user, history in enumerate(histories):
        expected = brute_force(model, memory, catalog, history, candidates)
        order = np.argsort(-expected)
        np.testing.assert_array_equal(found.codes[user, : len(order)], candidates[order])
        np.testing.assert_allclose(
            found.scores[user, : len(order)], expected[order], rtol=1e-5, atol=2e-5
        )


def test_excluded_sids_are_left_out_and_the_rest_keeps_its_order():
    model, memory, catalog, rng = make((4, 3, 5), 25, True, 6)
    histories = [rng.integers(0, 25, 3), rng.integers(0, 25, 2)]
    prompts = {k: jnp.asarray(v) for k, v in prompt_rows(catalog, histories, 4).items()}
    cached = CachedSidLM(model, memory)
    search = jax.jit(lambda gone: beam_search(cached, prompts, 25, catalog.trie.levels, gone))
    everything = search(jnp.full((2, 2), -1))
    excluded = np.array([[3, 7], [0, -1]])
    found = search(jnp.asarray(excluded))
    for user in range(2):
        groups = catalog.groups(np.asarray(everything.codes[user]))
        kept = ~np.isin(groups, excluded[user]) & (groups >= 0)
        expected = np.asarray(everything.codes[user])[kept]
        np.testing.assert_array_equal(found.codes[user, : len(expected)], expected)
        assert np.isneginf(found.scores[user, len(expected) :]).all()


class Bag:
    """An encoder-decoder of another kind: a bag of the prompt's items, a step without any cache."""

    levels = 3

    def __init__(self, rng):
        self.items = jnp.asarray(rng.normal(size=(30, 8)))
        self.codes = [jnp.asarray(rng.normal(size=(size, 8))) for size in (4, 3, 5)]

    def start(self, prompts):
        encoded = self.items[prompts].sum(axis=1)
        return encoded @ self.codes[0].T, encoded

    def step(self, codes, parent, state):
        level = codes.shape[-1]
        query = state[:, None] + sum((i + 2) * self.codes[i][codes[..., i]] for i in range(level))
        return query @ self.codes[level].T, state


def test_any_model_of_sids_can_be_searched():
    rng = np.random.default_rng(0)
    model, prompts = Bag(rng), rng.integers(0, 30, (2, 6))
    found = beam_search(model, jnp.asarray(prompts), 60, None)
    candidates = np.array(list(itertools.product(range(4), range(3), range(5))))
    for user in range(2):
        encoded = np.asarray(model.items)[prompts[user]].sum(axis=0)
        expected = np.zeros(60)
        for level, table in enumerate(model.codes):
            query = encoded + sum(
                (i + 2) * np.asarray(model.codes[i])[candidates[:, i]] for i in range(level)
            )
            logits = np.broadcast_to(query, (60, 8)) @ np.asarray(table).T
            logits -= np.log(np.exp(logits).sum(axis=1, keepdims=True))
            expected += logits[np.arange(60), candidates[:, level]]
        order = np.argsort(-expected)
        np.testing.assert_array_equal(found.codes[user], candidates[order])
        np.testing.assert_allclose(found.scores[user], expected[order], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("with_encoder", [False, True])
def test_narrow_beams_are_valid_distinct_and_keep_the_best_prefixes(with_encoder):
    model, memory, catalog, rng = make((5, 4, 6), 40, with_encoder, 3)
    histories = [rng.integers(0, 40, 3), rng.integers(0, 40, 1)]
    prompts = {k: jnp.asarray(v) for k, v in prompt_rows(catalog, histories, 4).items()}
    cached = CachedSidLM(model, memory)
    found = jax.jit(lambda p: beam_search(cached, p, 6, catalog.trie.levels))(prompts)
    for user, history in enumerate(histories):
        sids = np.asarray(found.codes[user])
        assert len({tuple(sid) for sid in sids.tolist()}) == 6
        assert (catalog.groups(sids) >= 0).all()
        scores = np.asarray(found.scores[user])
        assert (np.diff(scores) <= 0).all()
        np.testing.assert_allclose(
            scores, brute_force(model, memory, catalog, history, sids), rtol=1e-5, atol=2e-5
        )


def test_a_user_is_decoded_the_same_in_any_batch():
    model, memory, catalog, rng = make((5, 4, 6), 40, True, 4)
    histories = [rng.integers(0, 40, length) for length in (4, 1, 3)]

    cached = CachedSidLM(model, memory)
    jitted = jax.jit(lambda p: beam_search(cached, p, 5, catalog.trie.levels))

    def search(chosen):
        rows = prompt_rows(catalog, chosen, 4)
        rows = {k: jnp.asarray(v) for k, v in rows.items()}
        return jitted(rows)

    together = search(histories)
    for user, history in enumerate(histories):
        alone = search([history])
        assert np.array_equal(alone.codes[0], together.codes[user])
        np.testing.assert_allclose(alone.scores[0], together.scores[user], rtol=1e-5, atol=1e-5)


def test_a_million_beams_over_a_real_catalogue_are_valid_and_distinct():
    """amazon180k, 4 x 256: scrambled logits, which know nothing of the catalogue."""
    catalog = load_dataset(real_data("amazon180k")).catalog
    space, users, beams = catalog.space, 250, 500

    class Scrambled:
        levels = space.levels

        def __init__(self, seed):
            self.seed = seed

        def start(self, prompts):
            return self._logits((users, space.codebook_sizes[0]), 0), None

        def step(self, codes, parent, state):
            level = codes.shape[-1]
            shape = (*codes.shape[:2], space.codebook_sizes[level])
            return self._logits(shape, level), None

        def _logits(self, shape, level):
            place = jnp.arange(math.prod(shape), dtype=jnp.uint32) + self.seed * 7919 + level
            mixed = (place ^ (place >> 15)) * jnp.uint32(2_246_822_519)
            mixed = (mixed ^ (mixed >> 13)) * jnp.uint32(3_266_489_917)
            return (mixed >> 8).astype(jnp.float32).reshape(shape) * (8 / 2**24)

    search = jax.jit(lambda seed, trie: beam_search(Scrambled(seed), None, beams, trie))
    generated = 0
    for batch in range(8):
        found = search(jnp.uint32(batch), catalog.trie.levels)
        groups = catalog.groups(np.asarray(found.codes).reshape(-1, space.levels))
        assert (groups >= 0).all()
        ordered = np.sort(groups.reshape(users, beams), axis=1)
        assert (np.diff(ordered, axis=1) > 0).all()
        generated += users * beams
    assert generated == 1_000_000
