"""Beam search against brute force: every candidate scored by whole forward passes."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import real_data
from hypothesis import example, given, settings
from hypothesis import strategies as st
from models import DECODER, FAMILIES, make_encoder_decoder, make_model, prompts, whole_logits

from prefixmem_jax.data.formats.parquet import read_catalog
from prefixmem_jax.inference import cached_sid_lm
from prefixmem_jax.inference.beam_search import beam_search
from prefixmem_jax.inference.cached_sid_lm import CachedSidLM
from prefixmem_jax.inference.item_prior import Returning
from prefixmem_jax.semantic_ids.trie import Trie


def brute_force(model, rows_at, catalog, histories, candidates):
    """Log-probabilities [users, n] of candidate SIDs, a whole sequence for each.

    Args:
      candidates: [n, levels], or [users, n, levels] where every user has others.
    """
    vocabulary, users = model.vocabulary, len(histories)
    candidates = np.broadcast_to(candidates, (users, *candidates.shape[-2:]))
    count = candidates.shape[1]
    item_tokens = vocabulary.encode(catalog.sids)
    given = [np.r_[vocabulary.bos_token, item_tokens[h].reshape(-1)] for h in histories]
    tokens = vocabulary.encode(candidates)
    sequences = [np.r_[given[user], sid] for user in range(users) for sid in tokens[user]]
    logits = whole_logits(model, rows_at, sequences)
    logits = logits.reshape(users, count, *logits.shape[1:])
    total = np.zeros((users, count))
    for user, prompt in enumerate(given):
        for level in range(1, vocabulary.levels + 1):
            at = logits[user, :, len(prompt) + level - 2, slice(*vocabulary.token_range(level))]
            at = at - np.log(np.exp(at).sum(axis=1, keepdims=True))
            total[user] += at[np.arange(count), candidates[user, :, level - 1]]
    return total


def every_sid(sizes):
    return np.array(list(itertools.product(*map(range, sizes))), np.int32)


@pytest.mark.parametrize("family", [*FAMILIES, "encoder_decoder"])
@example((4, 3, 5), 25, True, True, [4, 1, 0], 5, True)  # whatever else is drawn
@settings(max_examples=1, deadline=None)
@given(
    sizes=st.sampled_from([(3, 4), (4, 3, 5), (2, 3, 2, 3)]),
    items=st.integers(1, 30),
    with_sid_encoder=st.booleans(),
    constrained=st.booleans(),
    lengths=st.lists(st.integers(0, 4), min_size=1, max_size=3),
    seed=st.integers(0, 1000),
    filled_up=st.booleans(),
)
def test_wide_beams_equal_scoring_everything(
    family, sizes, items, with_sid_encoder, constrained, lengths, seed, filled_up
):
    """With prompts filled up too, as they are on TPUs."""
    llm = {"make_llm": make_encoder_decoder} if family == "encoder_decoder" else {}
    model, rows_at, catalog, rng = make_model(
        sizes, items, with_sid_encoder, seed, FAMILIES.get(family, DECODER), **llm
    )
    candidates = catalog.group_sids if constrained else every_sid(sizes)
    histories = [rng.integers(0, items, length) for length in lengths]
    beams = math.prod(sizes)  # wide enough that nothing is ever cut off
    trie = catalog.trie.levels if constrained else None
    search = jax.jit(lambda p: beam_search(CachedSidLM(model, rows_at), p, beams, trie))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cached_sid_lm, "on_tpus", lambda: filled_up)
        found = jax.device_get(search(prompts(model, catalog, histories, 4)))
    scores = brute_force(model, rows_at, catalog, histories, candidates)
    for user, expected in enumerate(scores):
        order = np.argsort(-expected, kind="stable")
        count = len(candidates)
        np.testing.assert_allclose(
            found.scores[user, :count], expected[order], rtol=1e-5, atol=2e-5
        )
        by_sid = {tuple(sid): score for sid, score in zip(candidates, expected, strict=True)}
        sids = [tuple(sid) for sid in found.codes[user, :count].tolist()]
        assert len(set(sids)) == count  # all distinct, and each with its own score
        for sid, score in zip(sids, found.scores[user], strict=False):
            assert abs(by_sid[sid] - score) < 2e-5 * max(1, abs(score))
        assert np.isneginf(found.scores[user, count:]).all()
        assert (found.codes[user, count:] == -1).all()


@pytest.fixture(scope="module", params=[False, True], ids=["plain", "sid_encoder"])
def searched(request):
    """A model, three histories, and a narrow search after them: of (histories, excluded)."""
    model, rows_at, catalog, rng = make_model((5, 4, 6), 40, request.param, 3)
    histories = [rng.integers(0, 40, length) for length in (4, 1, 3)]
    cached = CachedSidLM(model, rows_at)
    levels = catalog.trie.levels
    compiled = jax.jit(lambda p, gone: beam_search(cached, p, 6, levels, Returning(gone, 0)))

    def search(histories, excluded=((-1, -1),) * 3):
        given = prompts(model, catalog, histories, 4)
        return jax.device_get(compiled(given, jnp.array(excluded)))

    return model, rows_at, catalog, histories, search


def test_narrow_beams_are_valid_distinct_and_keep_the_best_prefixes(searched):
    model, rows_at, catalog, histories, search = searched
    found = search(histories)
    for sids, scores in zip(*found, strict=True):
        assert len({tuple(sid) for sid in sids.tolist()}) == 6
        assert (catalog.groups(sids) >= 0).all()
        assert (np.diff(scores) <= 0).all()
    expected = brute_force(model, rows_at, catalog, histories, found.codes)
    np.testing.assert_allclose(found.scores, expected, rtol=1e-5, atol=2e-5)


def test_prompts_are_filled_up_for_tpus_and_decoded_the_same(searched, monkeypatch):
    model, rows_at, catalog, histories, search = searched
    given = prompts(model, catalog, histories, 4)
    assert given.tokens.shape[1] % cached_sid_lm.TPU_ROWS
    monkeypatch.setattr(cached_sid_lm, "on_tpus", lambda: True)
    cached, levels = CachedSidLM(model, rows_at), catalog.trie.levels
    _, state = jax.eval_shape(cached.start, given)
    assert state.place.segments.shape[1] % cached_sid_lm.TPU_ROWS == 0
    filled_up = jax.jit(lambda p: beam_search(cached, p, 6, levels))(given)
    usual = search(histories)
    np.testing.assert_array_equal(filled_up.codes, usual.codes)
    np.testing.assert_allclose(filled_up.scores, usual.scores, rtol=1e-5, atol=2e-5)


def test_a_user_is_decoded_the_same_in_any_batch(searched):
    *_, histories, search = searched
    together = search(histories)
    for user, history in enumerate(histories):
        for others in ([np.array([7])] * 2, [np.array([], int), np.array([1, 2, 3, 4])]):
            alone = search([*others, history])
            assert np.array_equal(alone.codes[2], together.codes[user])
            np.testing.assert_allclose(alone.scores[2], together.scores[user], rtol=1e-5, atol=1e-5)


def test_excluded_sids_are_left_out_and_the_rest_keeps_its_order(searched):
    """And the next best SIDs take their places."""
    _, _, catalog, histories, search = searched
    everything = search(histories)
    groups = np.stack([catalog.groups(sids) for sids in everything.codes])
    excluded = np.array([[groups[0, 0], groups[0, 3]], [groups[1, 5], -1], [-1, -1]])
    found = search(histories, excluded)
    for user in range(3):
        kept = ~np.isin(groups[user], excluded[user])
        expected = everything.codes[user][kept]
        np.testing.assert_array_equal(found.codes[user, : len(expected)], expected)
        assert (found.scores[user, len(expected) :] <= everything.scores[user, -1]).all()
        left = catalog.groups(found.codes[user])
        assert len(np.unique(left)) == 6 and not np.isin(left, [-1, *excluded[user]]).any()


def test_prefixes_of_nothing_but_excluded_sids_take_no_place():
    """A user who has had what the model likes best gets as many others."""
    rng = np.random.default_rng(0)
    sids = every_sid((6, 5, 4))[rng.permutation(120)[:60]]
    trie, beams = Trie(sids, (6, 5, 4)), 12
    model, prompt = Bag(rng, (6, 5, 4)), rng.integers(0, 30, (1, 6))
    search = jax.jit(
        lambda beams, gone: beam_search(model, prompt, beams, trie.levels, Returning(gone, 0)),
        static_argnums=0,
    )
    everything = search(60, np.full((1, 1), -1))
    order = trie.find(np.asarray(everything.codes[0]))
    # The likeliest, and all that the second likeliest first code has.
    first = trie.sids[order, 0]
    whole = order[first == first[first != first[0]][0]]
    gone = np.union1d(order[:20], whole)
    left = order[~np.isin(order, gone)]
    found = search(60, gone[None])
    np.testing.assert_array_equal(trie.find(np.asarray(found.codes[0]))[: len(left)], left)
    assert np.isneginf(found.scores[0, len(left) :]).all()
    narrow = trie.find(np.asarray(search(beams, gone[None]).codes[0]))
    assert (narrow >= 0).all() and not np.isin(narrow, gone).any()


class Bag:
    """An encoder-decoder of another kind: a bag of the prompt's items, a step without any cache."""

    levels = 3

    def __init__(self, rng, sizes=(4, 3, 5)):
        self.items = jnp.asarray(rng.normal(size=(30, 8)))
        self.codes = [jnp.asarray(rng.normal(size=(size, 8))) for size in sizes]

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
    found = jax.jit(lambda p: beam_search(model, p, 60, None))(prompts)
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


def test_beams_over_a_real_catalogue_are_valid_and_distinct():
    """amazon180k, 4 x 256: scrambled logits, which know nothing of the catalogue."""
    catalog = read_catalog(real_data("amazon180k"))
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
    for batch in range(2):
        found = search(jnp.uint32(batch), catalog.trie.levels)
        groups = catalog.groups(np.asarray(found.codes).reshape(-1, space.levels))
        assert (groups >= 0).all()
        ordered = np.sort(groups.reshape(users, beams), axis=1)
        assert (np.diff(ordered, axis=1) > 0).all()
