"""Cross-entropy piece by piece, over any mesh, against NumPy and against plain autodiff."""

import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from prefixmem_jax.config_groups import MeshConfig
from prefixmem_jax.layers import loss_in_pieces
from prefixmem_jax.layers.softmax_head import SoftmaxHead, cross_entropy
from prefixmem_jax.parallel.mesh import make_mesh
from prefixmem_jax.parallel.sharding import constrain, gather_over_fsdp, spec

BATCH, LENGTH, MODEL, OUTPUTS = 8, 5, 16, 40


def inputs():
    rng = np.random.default_rng(0)
    hidden = rng.normal(size=(BATCH, LENGTH, MODEL)).astype(np.float32)
    weight = rng.normal(size=(MODEL, OUTPUTS)).astype(np.float32)
    target = rng.integers(0, 30, (BATCH, LENGTH)).astype(np.int32)
    of_prediction = rng.integers(0, 3, (BATCH, LENGTH)).astype(np.float32)
    return hidden, weight, np.where(of_prediction > 0, target, -1), of_prediction


def reference(hidden, weight, target, of_prediction, softcap, outputs, smoothing):
    logits = hidden.astype(np.float64) @ weight
    if softcap:
        logits = softcap * np.tanh(logits / softcap)
    logits = logits[..., :outputs]
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    own = np.take_along_axis(logits, np.maximum(target, 0)[..., None], -1)
    own_log_p = np.take_along_axis(log_p, np.maximum(target, 0)[..., None], -1)[..., 0]
    loss = -(1 - smoothing) * own_log_p - smoothing * log_p.mean(-1)
    return np.sum(loss * of_prediction), (logits >= own).sum(-1)


def value_and_gradients(softcap, outputs, smoothing, best=1):
    hidden, weight, target, of_prediction = inputs()

    @jax.jit
    def both(hidden, weight):
        def loss(hidden, weight):
            placed = constrain(hidden, "batch", None, None)
            gathered = gather_over_fsdp(weight, "float32", None, "vocabulary")
            head = SoftmaxHead(gathered, softcap, outputs)
            batch = (constrain(jnp.asarray(x), "batch", None) for x in (target, of_prediction))
            losses = cross_entropy(placed, head, *batch, smoothing, best)
            return 3 * losses.loss, losses.hit

        return jax.value_and_grad(loss, (0, 1), has_aux=True)(hidden, weight)

    return jax.device_get(both(jnp.asarray(hidden), jnp.asarray(weight)))


def in_pieces_of(
    monkeypatch: pytest.MonkeyPatch, logits: int, by_output: bool = False, one_pass: bool = False
) -> None:
    """So many logits at a time; each output's together, as on TPUs, if it says so; and as on TPUs
    in bfloat16, but in float32.
    """
    monkeypatch.setattr(loss_in_pieces, "FEWEST_PREDICTIONS", 1)
    monkeypatch.setattr(loss_in_pieces, "ONE_PASS", ("float32",) if one_pass else ())
    monkeypatch.setattr(
        loss_in_pieces,
        "_by_platform",
        lambda function, here, *operands: function(here, logits, by_output, *operands),
    )


CASES = [(None, None, 0.0), (None, 33, 0.0), (None, 30, 0.1), (2.0, None, 0.0), (2.0, 33, 0.3)]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(
    ("at_once", "best", "order"),
    [
        (1, 1, (False, False)),
        (7 * OUTPUTS, 1, (True, False)),
        (7 * OUTPUTS, 1, (True, True)),
        (2**20, 4, (False, False)),
        (2**20, 4, (True, False)),
        (2**20, 4, (True, True)),
    ],
)
def test_it_is_the_reference_however_it_is_cut(case, at_once, best, order, monkeypatch):
    in_pieces_of(monkeypatch, at_once, *order)
    (loss, hit), gradients = value_and_gradients(*case, best)
    *arrays, target, of_prediction = inputs()
    expected, expected_rank = reference(*arrays, target, of_prediction, *case)
    np.testing.assert_allclose(loss, 3 * expected, rtol=1e-5)
    asked = of_prediction > 0
    assert 0 < (expected_rank[asked] <= best).mean() < 1
    np.testing.assert_array_equal(hit[asked], expected_rank[asked] <= best)

    def plain(hidden, weight):
        flat = (hidden.reshape(-1, MODEL), weight, target.reshape(-1), of_prediction.reshape(-1))
        return 3 * loss_in_pieces.whole(loss_in_pieces.Loss(*case, 1, None), *flat)[0]

    wanted = jax.grad(plain, (0, 1))(*arrays)
    chex.assert_trees_all_close(gradients, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("case", "shapes"),
    [
        (CASES[1], [(2, 2, 2), (1, 1, 8)]),
        (CASES[2], [(2, 2, 2), (8, 1, 1)]),
        (CASES[3], [(2, 2, 2), (1, 4, 2)]),
        (CASES[4], [(2, 2, 2), (1, 1, 8)]),
    ],
)
def test_any_mesh_gives_the_same(case, shapes, monkeypatch):
    in_pieces_of(monkeypatch, 3 * OUTPUTS)
    alone = value_and_gradients(*case)
    for one_pass, shape in itertools.product((False, True), shapes):
        in_pieces_of(monkeypatch, 3 * OUTPUTS, True, one_pass)
        with jax.set_mesh(make_mesh(MeshConfig(*shape))):
            divided = value_and_gradients(*case)
        chex.assert_trees_all_close(divided, alone, rtol=1e-4, atol=1e-5)


def test_a_weight_that_lies_divided_gets_its_gradient_where_it_lies():
    mesh = make_mesh(MeshConfig(2, 2, 2))
    hidden, weight, target, of_prediction = inputs()
    stored = jax.NamedSharding(mesh, spec("stored_model", "vocabulary"))

    def loss(weight):
        head = SoftmaxHead(gather_over_fsdp(weight, "float32", None, "vocabulary"))
        batch = (
            constrain(jnp.asarray(x), "batch", *(None,) * (x.ndim - 1))
            for x in (hidden, target, of_prediction)
        )
        placed, *batch = batch
        return cross_entropy(placed, head, *batch).loss

    alone = jax.grad(loss)(jnp.asarray(weight))
    with jax.set_mesh(mesh):
        divided = jax.jit(jax.grad(loss))(jax.device_put(weight, stored))
    assert divided.sharding.is_equivalent_to(stored, 2)
    np.testing.assert_allclose(divided, alone, rtol=1e-4, atol=1e-5)


def one_piece(hidden, weight, target, by_output):
    """Losses' sum, hits and gradients of predictions [N] that weigh 1, in one piece."""
    here = loss_in_pieces.Loss(None, None, 0.0, 1, None)
    operands = (*map(jnp.asarray, (hidden, weight, target)), jnp.ones(len(target)))
    return loss_in_pieces._in_pieces_with_gradients(here, 2**20, by_output, *operands)


@pytest.mark.parametrize("by_output", [False, True])
def test_outputs_that_are_alike_are_no_hits(by_output):
    """As of a model whose new tokens all begin with one vector."""
    rng = np.random.default_rng(0)
    hidden = jnp.asarray(rng.normal(size=(64, 512)), jnp.bfloat16)
    weight = jnp.asarray(np.repeat(rng.normal(size=(1, 512)), 8, axis=0), jnp.bfloat16)
    (loss, hit), _ = one_piece(hidden, weight, np.arange(64) % 8, by_output)
    np.testing.assert_allclose(loss, 64 * np.log(8), rtol=1e-5)
    assert not hit.any()


def test_one_pass_in_bfloat16_is_as_near_as_its_numbers():
    rng = np.random.default_rng(0)
    hidden = jnp.asarray(rng.normal(size=(64, 256)), jnp.bfloat16)
    weight = jnp.asarray(0.2 * rng.normal(size=(100, 256)), jnp.bfloat16)
    target = rng.integers(0, 100, 64)
    (loss, hit), gradients = one_piece(hidden, weight, target, by_output=True)
    exact = (np.asarray(x, np.float32) for x in (hidden, weight))
    (wanted, wanted_hit), wanted_gradients = one_piece(*exact, target, by_output=False)
    np.testing.assert_allclose(loss, wanted, rtol=1e-5)
    np.testing.assert_array_equal(hit, wanted_hit)
    for found, wanted in zip(gradients, wanted_gradients, strict=True):
        np.testing.assert_allclose(
            found.astype(np.float32), wanted, rtol=2**-6, atol=2**-8 * np.abs(wanted).max()
        )


def test_a_hopeless_prediction_costs_no_more_than_its_bound_and_nothing_overflows():
    hidden = jnp.asarray([[100.0], [1.0]], jnp.bfloat16)
    weight = jnp.asarray([[1.0], [-1.0], [0.0]], jnp.bfloat16)
    (loss, hit), gradients = one_piece(hidden, weight, np.int32([1, 1]), by_output=True)
    usual = np.log(np.exp(2.0) + 1 + np.exp(1.0))
    np.testing.assert_allclose(loss - usual, loss_in_pieces.FURTHEST + np.log(2), rtol=1e-5)
    assert not hit.any()
    assert all(np.isfinite(gradient).all() for gradient in gradients)
    assert gradients[0][0, 0] > 0 and gradients[1][1, 0] < 0


def test_what_weighs_nothing_may_have_any_target():
    """All logits so low that nothing is left of their exponentials, and no output is the target."""
    hidden = jnp.asarray([[200.0], [1.0]], jnp.bfloat16)
    weight = jnp.asarray([[-1.0], [-1.5], [-2.0]], jnp.bfloat16)
    here = loss_in_pieces.Loss(None, None, 0.0, 1, None, first=100)
    for target in (-1, 0, 99, 103, 2**31 - 1):
        operands = hidden, weight, jnp.asarray([target, 101]), jnp.asarray([0.0, 1.0])
        found = loss_in_pieces._in_pieces_with_gradients(here, 2**20, True, *operands)
        (wanted, _), gradients = loss_in_pieces._in_pieces_with_gradients(
            here, 2**20, False, *operands
        )
        np.testing.assert_allclose(found[0][0], wanted, rtol=1e-6)
        for ours, theirs in zip(found[1], gradients, strict=True):
            np.testing.assert_allclose(
                ours.astype(np.float32), theirs.astype(np.float32), rtol=2**-6, atol=2**-8
            )


@pytest.mark.parametrize("by_output", [False, True])
@pytest.mark.parametrize("wrong", [np.nan, np.inf])
def test_what_is_not_a_number_is_no_loss_and_no_hit(by_output, wrong):
    hidden = jnp.asarray([[wrong, 1.0], [1.0, 1.0]], jnp.bfloat16)
    weight = jnp.asarray([[1.0, 0.0], [-1.0, 0.0], [0.5, 2.0]], jnp.bfloat16)
    (loss, hit), _ = one_piece(hidden, weight, np.int32([1, 2]), by_output)
    assert not np.isfinite(loss)
    assert hit.tolist() == [False, True]
