"""The item head: its loss against NumPy, its say in the search against brute force."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models import DECODER, make_model, prompts, small_config
from test_beam_search import brute_force

from prefixmem_jax.config_groups import DecoderConfig, ItemHeadConfig
from prefixmem_jax.data.batch import take_rows
from prefixmem_jax.data.prepare import fixed_sample, prepare_data
from prefixmem_jax.errors import UserError
from prefixmem_jax.inference.beam_search import beam_search
from prefixmem_jax.inference.cached_sid_lm import CachedSidLM
from prefixmem_jax.memory.table import Lookup
from prefixmem_jax.model_spec import ModelSpec
from prefixmem_jax.models.item_head import item_places
from prefixmem_jax.parallel.mesh import make_mesh

CONFIG = small_config(
    DecoderConfig(layers=1), 0, item_head=ItemHeadConfig(vectors="own", weight=0.7)
)


@pytest.fixture(scope="module")
def data():
    return prepare_data(CONFIG.data)


def log_softmax(x):
    return x - np.log(np.exp(x).sum(axis=-1, keepdims=True))


def test_every_item_that_a_batch_predicts_is_found_once(data):
    rows = take_rows(CONFIG.objective.training_rows(data, CONFIG.data, seed=0), slice(8))
    index, items = map(np.asarray, item_places(jnp.asarray(rows.next_item), 4))
    assert items.shape[1] == (64 - 1) // 4
    for row, (places, named) in enumerate(zip(index, items, strict=True)):
        chosen = places[named >= 0]
        assert len(set(chosen.tolist())) == len(chosen) == (rows.next_item[row] > 0).sum()
        for place, item in zip(chosen, named[named >= 0], strict=True):
            following = rows.tokens[row, place + 1 : place + 5]
            np.testing.assert_array_equal(following, data.item_tokens[item])
            assert (rows.segment_ids[row, place : place + 5] == rows.segment_ids[row, place]).all()


def test_the_loss_is_that_of_the_codes_and_a_softmax_over_items(data):
    spec = ModelSpec.create(CONFIG, data.vocabulary, make_mesh(devices=jax.devices()[:1]))
    params = spec.init_params(jax.random.key(0))
    params["item_head"] = jax.tree.map(lambda x: 30 * x, params["item_head"])
    rows = CONFIG.objective.validation_rows(data, CONFIG.data, 6, 1)
    model = spec.model(params)
    memory = jax.random.normal(jax.random.key(1), spec.table.shape)
    fetched = Lookup(spec.table.gather(memory, model.memory_addresses(rows).by_position))
    sums = jax.device_get(CONFIG.objective.loss_sums(model, rows, fetched, None))
    plain = dataclasses.replace(CONFIG, item_head=None)
    bare = ModelSpec.create(plain, data.vocabulary, spec.mesh)
    codes = bare.model({part: params[part] for part in bare.params})
    without = jax.device_get(plain.objective.loss_sums(codes, rows, fetched, None))
    hidden = np.asarray(model(rows, fetched.by_position)[0])
    vectors = np.asarray(params["item_head"]["vectors"])
    validation, losses, hits = data.split.validation, [], []
    for row, target in enumerate(validation.take(fixed_sample(len(validation), 6)).targets):
        # Of a held-out example only the target is predicted: from the code before its first.
        (place,) = np.flatnonzero((rows.next_item[row] == target + 1) & (rows.loss_mask[row] > 0))
        scores = hidden[row, place] @ vectors[:, : len(data.catalog)]
        losses.append(-log_softmax(scores)[target])
        hits.append((scores >= scores[target]).sum() <= 10)
    assert sums["item_count"] == 6 and sums["item_hits"] == sum(hits)
    np.testing.assert_allclose(sums["item_loss"], np.sum(losses), rtol=1e-5)
    np.testing.assert_allclose(sums["loss"], without["loss"] + 0.7 * np.sum(losses), rtol=1e-5)
    assert without["count"] == sums["count"] == 24


@pytest.mark.parametrize("mix", [0.0, 0.4, 1.0])
def test_a_wide_search_ranks_by_both(mix):
    model, rows_at, catalog, rng = make_model(
        (4, 3, 5), 40, True, 5, DECODER, ItemHeadConfig(vectors="own")
    )
    model.item_head.vectors[...] = 40 * model.item_head.vectors[...]
    histories = [rng.integers(0, 40, length) for length in (3, 0, 4)]
    given = prompts(model, catalog, histories, 4)
    cached = CachedSidLM(model, rows_at)
    groups = jnp.asarray(catalog.group_of_item, jnp.int32)
    search = jax.jit(
        lambda p, beams: beam_search(cached, p, beams, catalog.trie.levels, None, groups, mix),
        static_argnums=1,
    )
    found, narrow = (jax.device_get(search(given, beams)) for beams in (60, 4))
    by_codes = brute_force(model, rows_at, catalog, histories, catalog.group_sids)
    items = log_softmax(np.asarray(cached.item_logits(cached.start(given)[1]), np.float64))
    for user in range(3):
        mass = np.bincount(catalog.group_of_item, np.exp(items[user, :40]))
        expected = (1 - mix) * by_codes[user] + mix * np.log(mass)
        order = np.argsort(-expected)
        count = len(order)
        np.testing.assert_allclose(found.scores[user, :count], expected[order], atol=1e-4)
        np.testing.assert_array_equal(found.codes[user, 0], catalog.group_sids[order[0]])
        assert np.isneginf(found.scores[user, count:]).all()
        by_sid = dict(zip(map(tuple, catalog.group_sids.tolist()), expected, strict=True))
        wanted = [by_sid[tuple(sid)] for sid in narrow.codes[user].tolist()]
        np.testing.assert_allclose(narrow.scores[user], wanted, atol=1e-4)


def test_a_model_that_does_not_know_its_items_is_refused(data):
    unknown = dataclasses.replace(data.vocabulary, items=0)
    with pytest.raises(UserError, match="item_head needs the number of items"):
        ModelSpec.create(CONFIG, unknown, make_mesh(devices=jax.devices()[:1]))
