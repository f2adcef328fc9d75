"""Dropout, label smoothing, averaged parameters, and ending at the best validation."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models import make_run, small_config
from test_step import CONFIG, batch_at, losses, on_mesh, run, spec_of, with_optimizer

from prefixmem_jax.config_groups import CheckpointConfig, DecoderConfig, ItemHeadConfig
from prefixmem_jax.data.documents.items import Items
from prefixmem_jax.data.documents.pair import Pair
from prefixmem_jax.errors import UserError
from prefixmem_jax.layers.dropout import dropout
from prefixmem_jax.memory.table import Lookup
from prefixmem_jax.objectives.classification import Classification
from prefixmem_jax.objectives.next_token import NextToken
from prefixmem_jax.runs.metrics import read_metrics
from prefixmem_jax.runs.run import Run
from prefixmem_jax.training.hooks import Validation
from prefixmem_jax.training.loop import train
from prefixmem_jax.training.state import init_sharded

EVERYTHING = dataclasses.replace(
    with_optimizer(CONFIG, average_decay=0.9),
    objective=NextToken(label_smoothing=0.1),
    model=dataclasses.replace(CONFIG.model, dropout=0.3),
    sid_encoder=dataclasses.replace(
        CONFIG.sid_encoder, target_levels=(1, 2, 3), orders=3, dropout=0.2
    ),
    item_head=ItemHeadConfig("memory"),
)


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("size", [64, 7])  # a byte decides on a number: sizes of whole words or not
def test_dropout_drops_its_share_and_keeps_the_mean(rate, size):
    x = jnp.ones((400, 3, size))
    key = jax.random.key(0)
    found = np.asarray(dropout(x, rate, key))
    assert abs((found == 0).mean() - rate) < 0.02
    kept = found[found > 0]
    np.testing.assert_allclose(kept, 256 / (256 - round(256 * rate)), rtol=1e-6)
    assert abs(found.mean() - 1) < 0.03 / (1 - rate)
    np.testing.assert_array_equal(found, dropout(x, rate, key))
    assert (found != np.asarray(dropout(x, rate, jax.random.key(1)))).any()
    np.testing.assert_array_equal(dropout(x, rate, None), x)
    assert np.isfinite(dropout(x, 0.999, key)).all()
    # Neighbours share a word, not a fate.
    both = (found[..., 1:] == 0) & (found[..., :-1] == 0)
    assert abs(both.mean() - rate**2) < 0.03


def test_any_mesh_draws_alike():
    alone, state = run(EVERYTHING, 3)
    together, other = run(on_mesh(EVERYTHING, 2, 2, 2), 3)
    np.testing.assert_allclose(losses(together), losses(alone), rtol=2e-5)
    chex.assert_trees_all_close(other.average, state.average, rtol=1e-3, atol=1e-5)
    plain = dataclasses.replace(
        EVERYTHING, model=CONFIG.model, sid_encoder=CONFIG.sid_encoder, item_head=None
    )
    assert abs(losses(run(plain, 1)[0])[0] - losses(alone)[0]) > 0.1


def test_nothing_is_random_in_validation():
    """Nor smoothed: its loss is comparable between runs."""
    spec = spec_of(EVERYTHING)
    plain = dataclasses.replace(
        EVERYTHING,
        objective=NextToken(),
        model=CONFIG.model,
        sid_encoder=dataclasses.replace(EVERYTHING.sid_encoder, dropout=0.0),
    )
    params = spec.init_params(jax.random.key(0))
    rows = 20 * jax.random.normal(jax.random.key(1), spec.table.shape)
    batch = batch_at(0)

    def sums(config, key=None):
        @jax.jit
        def of(params, rows, batch, key):
            model = dataclasses.replace(spec, graphdef=spec_of(config).graphdef).model(params)
            addresses = model.memory_addresses(batch)
            fetched = Lookup(*(spec.table.gather(rows, x) for x in addresses[:2]))
            return config.objective.loss_sums(model, batch, fetched, key)

        return jax.device_get(of(params, rows, batch, key))

    chex.assert_trees_all_equal(sums(EVERYTHING), sums(plain))
    drawn = [sums(EVERYTHING, jax.random.key(seed))["loss"] for seed in (0, 1)]
    assert abs(drawn[0] - drawn[1]) > 0.1


def test_smoothing_spreads_a_share_evenly():
    spec = spec_of(dataclasses.replace(CONFIG, sid_encoder=None))
    model = spec.model(spec.init_params(jax.random.key(0)))
    batch = batch_at(0)
    found = NextToken(label_smoothing=0.2).loss_sums(model, batch, Lookup(), jax.random.key(0))
    logits = np.asarray(model.softmax_head().logits(model(batch, None)[0]), np.float64)
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    target = np.pad(batch.tokens[:, 1:], ((0, 0), (0, 1)))
    own = np.take_along_axis(log_p, target[..., None], -1)[..., 0]
    expected = -(0.8 * own + 0.2 * log_p.mean(-1)) * batch.loss_mask
    np.testing.assert_allclose(found["loss"], expected.sum(), rtol=1e-5)


@pytest.mark.parametrize("tied", [False, True])
def test_a_softmax_over_sids_alone(tied):
    """The loss and hits of the same logits without those of padding and BOS."""
    shape = dataclasses.replace(CONFIG.model, tied_embeddings=tied)
    config = dataclasses.replace(CONFIG, sid_encoder=None, model=shape)
    objective, batch = NextToken(softmax="sids"), batch_at(0)
    spec = spec_of(dataclasses.replace(config, objective=objective))
    params = spec.init_params(jax.random.key(0))
    chex.assert_trees_all_equal(params, spec_of(config).init_params(jax.random.key(0)))
    model = spec.model(params)
    found = objective.loss_sums(model, batch, Lookup(), None)
    tokens, whole = model.vocabulary, spec_of(config).model(params)
    logits = np.asarray(whole.softmax_head().logits(whole(batch, None)[0]), np.float64)
    of_sids = logits[..., tokens.sid_offset : tokens.used]
    log_p = of_sids - np.log(np.exp(of_sids).sum(-1, keepdims=True))
    target = np.pad(batch.tokens[:, 1:], ((0, 0), (0, 1)))
    own = np.maximum(target - tokens.sid_offset, 0)[..., None]
    loss = -np.take_along_axis(log_p, own, -1)[..., 0] * batch.loss_mask
    np.testing.assert_allclose(found["loss"], loss.sum(), rtol=1e-5)
    best = (of_sids.argmax(-1)[..., None] == own)[..., 0] * batch.loss_mask
    assert found["hits"].sum() == best.sum() > 0
    assert loss.sum() < float(NextToken().loss_sums(whole, batch, Lookup(), None)["loss"])


def test_a_softmax_over_sids_alone_is_the_same_on_any_mesh():
    config = dataclasses.replace(CONFIG, objective=NextToken(softmax="sids"))
    alone, state = run(config, 3)
    together, other = run(on_mesh(config, 2, 2, 2), 3)
    np.testing.assert_allclose(losses(together), losses(alone), rtol=2e-5)
    np.testing.assert_allclose(other.memory, state.memory, rtol=1e-4, atol=2e-6)


def test_stage_one_has_a_softmax_over_sids_alone_too():
    """Its head has their tokens and no others; the loss is that of the same head, cut."""
    objective, batch = Classification(softmax="sids"), batch_at(0)
    spec = spec_of(dataclasses.replace(CONFIG, objective=objective))
    params, tokens = spec.init_params(jax.random.key(0)), spec.vocabulary
    codes = tokens.used - tokens.sid_offset
    assert params["head"].shape == (CONFIG.model.d_model, codes)
    model = spec.model(params)
    rows = 0.1 * jax.random.normal(
        jax.random.key(1), (*model.memory_addresses(batch).by_position.shape, spec.table.width)
    )
    found = objective.loss_sums(model, batch, Lookup(rows), None)
    logits = np.asarray(model(batch, rows)[0], np.float64) @ np.asarray(params["head"], np.float64)
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    own = np.maximum(np.pad(batch.tokens[:, 1:], ((0, 0), (0, 1))) - tokens.sid_offset, 0)
    active = np.asarray(objective.predicted(model, batch))
    loss = -np.take_along_axis(log_p, own[..., None], -1)[..., 0] * active
    np.testing.assert_allclose(found["loss"], loss.sum(), rtol=1e-5)
    assert active.sum() > 0 and np.abs(log_p + np.log(codes)).max() > 1e-3


def test_stage_one_scores_no_items():
    head = ItemHeadConfig(vectors="own")
    config = dataclasses.replace(CONFIG, objective=Classification(), item_head=head)
    with pytest.raises(UserError, match="objective=classification scores no items"):
        config.check()


def test_text_is_not_predicted_by_a_softmax_over_sids():
    objective = NextToken(documents=(Items(), Pair()), softmax="sids")
    with pytest.raises(
        UserError, match=r"objective\.softmax=sids: documents of kind pair have text"
    ):
        dataclasses.replace(CONFIG, objective=objective).check()


def test_the_average_follows_the_parameters():
    config = with_optimizer(CONFIG, average_decay=0.5)
    average = run(config, 0)[1].params
    for step in range(3):
        params = run(config, step + 1)[1].params
        decay = min(0.5, (1 + step) / (10 + step))
        average = jax.tree.map(lambda a, p, d=decay: d * a + (1 - d) * p, average, params)
    state = run(config, 3)[1]
    chex.assert_trees_all_close(state.average, average, rtol=1e-5, atol=1e-7)
    plain = run(CONFIG, 3)[1]
    assert plain.average is None
    chex.assert_trees_all_equal(plain.params, state.params)  # training does not see it


def test_neither_parameters_nor_average_may_be_saved_where_they_are_no_good():
    spec = spec_of(with_optimizer(CONFIG, average_decay=0.9))
    validation = Validation(spec, None, batch_at(0), None)
    with jax.set_mesh(spec.mesh):
        state = init_sharded(spec, 0)
        assert validation.is_finite(state)
        bad = jax.tree.map(lambda x: x * jnp.nan, state.params)
        assert not validation.is_finite(state._replace(params=bad))
        assert not validation.is_finite(state._replace(average=bad))


def test_before_there_is_a_best_the_newest_is_read(tmp_path):
    run = make_run(tmp_path / "run", STILL)
    assert run.step == 0
    with pytest.raises(UserError, match="no kept checkpoint has a validation item_ndcg@10"):
        _ = Run(run.path, step="best").step


SMALL = small_config(DecoderConfig(layers=1), 0)
STILL = dataclasses.replace(
    SMALL,
    steps=40,
    data=dataclasses.replace(SMALL.data, batch_size=8),
    checkpoint=CheckpointConfig(every_steps=3, keep=1),
    evaluation=dataclasses.replace(
        SMALL.evaluation,
        every_steps=2,
        validation_examples=20,
        select_by="item_ndcg@10",
        patience=3,
    ),
)


def test_a_run_ends_when_validation_gets_no_better_and_keeps_the_best(tmp_path, first_device_alone):
    """Its rate is so low that nothing changes: the first validation stays the best."""
    config = with_optimizer(STILL, learning_rate=1e-12, average_decay=0.9)
    state = train(config, tmp_path / "run")
    assert int(state.step) == 8  # 2 was the best; 4, 6 and 8 were not better
    run = Run(tmp_path / "run")
    assert [r["step"] for r in read_metrics(run.path) if "gradient_norm" in r][-1] == 8
    with run.checkpoints() as checkpoints:
        assert checkpoints.steps == [8, 2]  # the newest, and the best
    assert run.step == 2 and Run(run.path, step="best").step == 2
    assert Run(run.path, step=8).step == 8
    values = [
        r["validation/item_ndcg@10"] for r in read_metrics(run.path) if "validation/loss" in r
    ]
    assert values and all(0 <= value <= 1 for value in values)
    spec = run.spec(jax.devices()[:1])
    averaged = Run(run.path, step=8).load(spec, spec.params)
    chex.assert_trees_all_equal(averaged, jax.device_get(state.average))
    again = train(config, tmp_path / "run")  # it has ended
    assert int(again.step) == 8
    options = dataclasses.replace(config.evaluation, patience=5)
    longer = train(dataclasses.replace(config, evaluation=options), tmp_path / "run")
    assert int(longer.step) == 12  # more patience goes on from there
    by_loss = dataclasses.replace(options, select_by="loss", patience=3)
    other = train(dataclasses.replace(config, evaluation=by_loss), tmp_path / "run")
    assert int(other.step) == 20  # the first by another metric, 14, is the best by that one
    with run.checkpoints() as checkpoints:
        assert checkpoints.steps == [20, 14]


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"select_by": None}, "patience needs a metric"),
        ({"select_by": "item_recall@10"}, "recommends nothing"),
    ],
)
def test_selection_that_cannot_be_is_refused(changes, words, tmp_path):
    config = dataclasses.replace(STILL, evaluation=dataclasses.replace(STILL.evaluation, **changes))
    if changes["select_by"]:
        config = dataclasses.replace(config, objective=Classification())
    with pytest.raises(UserError, match=words):
        config.check()
    with pytest.raises(UserError, match=words):
        train(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()
