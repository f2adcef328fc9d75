"""The item head: its loss against NumPy, its say in the search against brute force."""

import dataclasses
import functools
import json
import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models import DECODER, SID_ENCODER, make_model, prompts, small_config
from test_beam_search import brute_force

from prefixmem_jax.config import Config
from prefixmem_jax.config_files import load_config, to_json
from prefixmem_jax.config_groups import DecoderConfig, ItemHeadConfig
from prefixmem_jax.data.batch import take_rows
from prefixmem_jax.data.documents.document import Corpus
from prefixmem_jax.data.prepare import fixed_sample, prepare_data
from prefixmem_jax.errors import UserError
from prefixmem_jax.inference.beam_search import beam_search
from prefixmem_jax.inference.cached_sid_lm import CachedSidLM, read_items
from prefixmem_jax.memory.table import Lookup
from prefixmem_jax.model_spec import ModelSpec
from prefixmem_jax.models import negatives
from prefixmem_jax.models.item_head import OwnVectors, item_places
from prefixmem_jax.parallel.mesh import make_mesh
from prefixmem_jax.training.step import compile_train_step

CONFIG = small_config(
    DecoderConfig(layers=1), 0, item_head=ItemHeadConfig(vectors="own", weight=0.7)
)


@pytest.fixture(scope="module")
def data():
    return prepare_data(CONFIG.data)


def log_softmax(x):
    return x - np.log(np.exp(x).sum(axis=-1, keepdims=True))


def test_every_item_that_a_batch_predicts_is_found_once(data):
    rows = take_rows(CONFIG.objective.training_rows(Corpus(data, CONFIG.data), seed=0), slice(8))
    index, items = map(np.asarray, item_places(jnp.asarray(rows.next_item), 4))
    assert items.shape[1] == (64 - 1) // 4
    for row, (places, named) in enumerate(zip(index, items, strict=True)):
        chosen = places[named >= 0]
        assert len(set(chosen.tolist())) == len(chosen) == (rows.next_item[row] > 0).sum()
        for place, item in zip(chosen, named[named >= 0], strict=True):
            following = rows.tokens[row, place + 1 : place + 5]
            np.testing.assert_array_equal(following, data.item_tokens[item])
            assert (rows.segment_ids[row, place : place + 5] == rows.segment_ids[row, place]).all()


def with_head(vectors: str, **keys) -> Config:
    memory = dataclasses.replace(SID_ENCODER, target_levels=(1, 2, 3, 4), orders=4)
    return dataclasses.replace(
        CONFIG, sid_encoder=memory, item_head=ItemHeadConfig(vectors, weight=0.7, **keys)
    )


def one_batch(config, data):
    """A model with a memory that matters, six validation rows, and what these look up."""
    spec = ModelSpec.create(config, data.vocabulary, make_mesh(devices=jax.devices()[:1]))
    params = spec.init_params(jax.random.key(0))
    params["sid_encoder"] = jax.tree.map(lambda x: 2 * x, params["sid_encoder"])
    if "item_head" in params:
        params["item_head"] = jax.tree.map(lambda x: 30 * x, params["item_head"])
    rows_at = partial(spec.table.gather, jax.random.normal(jax.random.key(1), spec.table.shape))
    batch = config.objective.validation_rows(data, config.data, 6, 1)
    model = spec.model(params)
    lookup = model.memory_addresses(batch, jax.random.key(2))
    found = Lookup(*(None if x is None else rows_at(x) for x in lookup[:2]), lookup.names)
    return spec, params, model, rows_at, batch, found


def loss_sums(config, model, batch, found, key):
    """Compiled as one program."""
    return jax.jit(lambda *given: config.objective.loss_sums(model, *given))(batch, found, key)


def vectors_of(model, rows_at, data):
    """Item vectors [items, D] as the items' own parameters, or as what is added at their ends."""
    if isinstance(model.item_head, OwnVectors):
        return np.asarray(model.item_head.vectors[...]).T[: len(data.catalog)]
    tokens = jnp.asarray(data.item_tokens)
    ones = jnp.ones_like(tokens)
    rows = rows_at(model.sid_encoder.addresses(tokens, ones, last=1))
    return np.asarray(model.sid_encoder(tokens, ones, rows, last=1))[:, -1]


def places_of_targets(data, batch, count):
    """Of held-out examples only the target is predicted: from the code before its first."""
    validation = data.split.validation
    for row, target in enumerate(validation.take(fixed_sample(len(validation), count)).targets):
        here = (batch.next_item[row] == target + 1) & (batch.loss_mask[row] > 0)
        (place,) = np.flatnonzero(here)
        yield row, place, target


@pytest.mark.parametrize("vectors", ["own", "memory"])
def test_the_loss_is_that_of_the_codes_and_a_softmax_over_items(vectors, data):
    config = with_head(vectors)
    spec, params, model, rows_at, batch, found = one_batch(config, data)
    assert ("item_head" in params) == (vectors == "own")
    sums = jax.device_get(loss_sums(config, model, batch, found, None))
    plain = dataclasses.replace(config, item_head=None)
    bare = ModelSpec.create(plain, data.vocabulary, spec.mesh)
    codes = bare.model({part: params[part] for part in bare.params})
    without = jax.device_get(loss_sums(plain, codes, batch, found, None))
    hidden = np.asarray(model(batch, found.by_position)[0])
    of_items, losses, hits = vectors_of(model, rows_at, data), [], []
    for row, place, target in places_of_targets(data, batch, 6):
        scores = of_items @ hidden[row, place]
        losses.append(-log_softmax(scores)[target])
        hits.append((scores >= scores[target]).sum() <= 10)
    assert np.std(losses) > 0.1
    assert sums["item_count"] == 6 and sums["item_hits"] == sum(hits)
    np.testing.assert_allclose(sums["item_loss"], np.sum(losses), rtol=1e-5)
    np.testing.assert_allclose(sums["loss"], without["loss"] + 0.7 * np.sum(losses), rtol=1e-5)
    assert without["count"] == sums["count"] == 24


def test_a_weight_of_the_loss_is_one_of_the_items_too(data):
    """A document that counts half, or twice, predicts the same items."""
    config = with_head("own")
    _, _, model, _, batch, found = one_batch(config, data)
    once = jax.device_get(loss_sums(config, model, batch, found, None))
    for weight in (0.5, 2.0):
        weighted = batch._replace(loss_mask=weight * batch.loss_mask)
        sums = jax.device_get(loss_sums(config, model, weighted, found, None))
        for name in ("loss", "item_loss", "item_count", "count"):
            np.testing.assert_allclose(sums[name], weight * once[name], rtol=1e-6)


def test_items_that_are_drawn_stand_for_all_others(data):
    config = with_head("memory", negatives=20)
    _, _, model, rows_at, batch, found = one_batch(config, data)
    sums = jax.device_get(loss_sums(config, model, batch, found, jax.random.key(2)))
    hidden = np.asarray(model(batch, found.by_position, jax.random.key(2))[0])
    of_items, drawn, losses = vectors_of(model, rows_at, data), np.asarray(found.names), []
    assert len(drawn) == 20 and "item_hits" not in sums
    shares = data.item_counts / data.item_counts.sum()
    expected = 10 / len(data.catalog) + 10 * shares
    assert np.std(expected) > 0.05
    for row, place, target in places_of_targets(data, batch, 6):
        scores = (of_items @ hidden[row, place]).astype(np.float64)
        others = (scores - np.log(expected))[drawn[drawn != target]]
        losses.append(np.log(np.exp(scores[target]) + np.exp(others).sum()) - scores[target])
    np.testing.assert_allclose(sums["item_loss"], np.sum(losses), rtol=1e-5)
    for many in (150, None):  # as many as there are, or more: all
        config = with_head("memory", negatives=many)
        _, _, model_of_all, _, _, of_all = one_batch(config, data)
        assert of_all.names is None and model_of_all.item_head.negatives is None
    names = [model.memory_addresses(batch, jax.random.key(seed)).names for seed in (2, 3)]
    np.testing.assert_array_equal(names[0], drawn)
    assert (np.asarray(names[1]) != drawn).any()


def test_a_step_that_draws_holds_nothing_of_every_item(data):
    """But for their SIDs: compiled, no array of numbers has as many entries as there are items."""
    items = 7919
    sids = np.random.default_rng(0).integers(0, 6, (items, 4), np.int32)
    vocabulary = dataclasses.replace(data.vocabulary, items=items, sids=sids)
    shapes = {}
    for few in (None, 64):
        config = with_head("memory", negatives=few)
        config = dataclasses.replace(config, data=dataclasses.replace(config.data, batch_size=8))
        spec = ModelSpec.create(config, vocabulary, make_mesh(devices=jax.devices()[:1]))
        shapes[few] = set(
            re.findall(r"(f32|pred)\[([\d,]*7919)\b", compile_train_step(spec).as_text())
        )
    assert shapes[None] and not shapes[64]


@functools.cache
def scored_users(vectors: str) -> tuple:
    """A model with an item head, three users' histories, and every SID's score by the codes."""
    head = ItemHeadConfig(vectors)
    model, rows_at, catalog, rng = make_model((4, 3, 5), 40, True, 5, DECODER, head)
    if vectors == "own":
        model.item_head.vectors[...] = 40 * model.item_head.vectors[...]
    histories = [rng.integers(0, 40, length) for length in (3, 0, 4)]
    by_codes = brute_force(model, rows_at, catalog, histories, catalog.group_sids)
    return model, rows_at, catalog, histories, by_codes


@pytest.mark.parametrize(
    ("vectors", "share"), [("own", 0.0), ("own", 0.4), ("memory", 0.4), ("memory", 1.0)]
)
def test_a_wide_search_ranks_by_both(vectors, share):
    model, rows_at, catalog, histories, by_codes = scored_users(vectors)
    read = None
    if vectors == "memory":
        read = read_items(model, rows_at, jnp.asarray(model.vocabulary.encode(catalog.sids)))
        assert read.shape == (40, DECODER.d_model) and np.std(read) > 0.1
    given = prompts(model, catalog, histories, 4)
    cached = CachedSidLM(model, rows_at, read)
    groups = jnp.asarray(catalog.group_of_item, jnp.int32)
    search = jax.jit(
        lambda p, beams: beam_search(cached, p, beams, catalog.trie.levels, None, groups, share),
        static_argnums=1,
    )
    found, narrow = (jax.device_get(search(given, beams)) for beams in (60, 4))
    items = log_softmax(np.asarray(cached.item_logits(cached.start(given)[1]), np.float64))
    for user in range(3):
        mass = np.bincount(catalog.group_of_item, np.exp(items[user, :40]))
        expected = (1 - share) * by_codes[user] + share * np.log(mass)
        order = np.argsort(-expected)
        count = len(order)
        np.testing.assert_allclose(found.scores[user, :count], expected[order], atol=1e-4)
        np.testing.assert_array_equal(found.codes[user, 0], catalog.group_sids[order[0]])
        assert np.isneginf(found.scores[user, count:]).all()
        by_sid = dict(zip(map(tuple, catalog.group_sids.tolist()), expected, strict=True))
        wanted = [by_sid[tuple(sid)] for sid in narrow.codes[user].tolist()]
        np.testing.assert_allclose(narrow.scores[user], wanted, atol=1e-4)


def test_a_head_without_what_it_reads_is_refused():
    two_items = dataclasses.replace(with_head("memory").sid_encoder, items=2)
    for keys, message in (
        ({"sid_encoder": None}, "no SID encoder that reads whole items"),
        ({"sid_encoder": SID_ENCODER}, "add level 1 to sid_encoder.target_levels"),
        ({"item_head": ItemHeadConfig("own", negatives=5)}, "item_head.negatives=5 is for"),
        (
            {"item_head": ItemHeadConfig("memory", negatives=5), "sid_encoder": two_items},
            "item_head.negatives=5: expected none, or sid_encoder.items of 1 at most, not 2",
        ),
    ):
        with pytest.raises(UserError, match=message):
            dataclasses.replace(with_head("memory"), **keys).check()


def test_a_run_from_before_heads_could_read_the_memory_keeps_its_own_vectors(tmp_path):
    saved = json.loads(to_json(with_head("own")))
    for key in ("vectors", "negatives"):
        del saved["item_head"][key]
    (tmp_path / "config.json").write_text(json.dumps(saved))
    assert load_config(tmp_path / "config.json") == with_head("own")


def test_a_memory_that_does_not_tell_items_apart_is_refused(data):
    short = dataclasses.replace(with_head("memory").sid_encoder, orders=3)
    config = dataclasses.replace(with_head("memory"), sid_encoder=short)
    mesh = make_mesh(devices=jax.devices()[:1])
    with pytest.raises(
        UserError, match=r"sid_encoder.orders=3: .* expected 4, or sid_encoder.items=1"
    ):
        ModelSpec.create(config, data.vocabulary, mesh)
    ModelSpec.create(
        dataclasses.replace(config, sid_encoder=dataclasses.replace(short, items=1)),
        data.vocabulary,
        mesh,
    )


def test_a_model_that_does_not_know_its_items_is_refused(data):
    unknown = dataclasses.replace(data.vocabulary, items=0)
    with pytest.raises(UserError, match="item_head needs the number of items"):
        ModelSpec.create(CONFIG, unknown, make_mesh(devices=jax.devices()[:1]))


def test_items_are_drawn_as_often_as_the_loss_expects(data):
    """The one half alike, the other as they occur: those that never do, half as often as alike."""
    counts = np.zeros(len(data.catalog), np.int64)
    counts[[3, 5, 149]] = 1, 6, 3
    vocabulary = dataclasses.replace(data.vocabulary, item_counts=counts)
    drawn = np.asarray(negatives.draw(vocabulary, jax.random.key(1), 60_001))
    times = np.bincount(drawn, minlength=len(counts))
    assert drawn.shape == (60_001,) and len(times) == len(counts)
    expected = np.asarray(negatives.expected(vocabulary, jnp.arange(len(counts)), 60_001))
    np.testing.assert_allclose(expected, 30_001 / len(counts) + 3000 * counts, rtol=1e-5)
    assert np.max(np.abs(times - expected) / np.sqrt(expected)) < 4.5
    unknown = dataclasses.replace(vocabulary, item_counts=None)
    alike = np.asarray(negatives.expected(unknown, jnp.arange(len(counts)), 60_001))
    np.testing.assert_allclose(alike, 60_001 / len(counts), rtol=1e-5)
