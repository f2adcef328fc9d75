"""A softmax's loss and its gradients, so many predictions at a time that their logits have room.

On one device's own predictions and outputs; `softmax_head.cross_entropy` is over the mesh.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint

# Logits that are computed at a time: on a CPU so many that they stay in its cache, elsewhere so
# many that they and their gradients leave room (3 GiB each).
CACHED_LOGITS, MOST_LOGITS = 2**20, 3 * 2**28
# But never so few predictions that reading all outputs' vectors for them costs more than they do.
FEWEST_PREDICTIONS = 128
# Of logits: exp(60) times any number of outputs is still a float32; and what rounding may be.
FURTHEST, EQUAL = 60.0, 1e-4
# Dtypes that TPUs multiply as they are; of float32 they round, so that a sum is not a product's.
ONE_PASS = ("bfloat16",)


def finish(
    products: jax.Array, number: jax.Array, softcap: float | None, outputs: int | None
) -> jax.Array:
    """Logits of dot products with the outputs of these numbers; see `SoftmaxHead`."""
    if softcap is not None:
        products = softcap * jnp.tanh(products / softcap)
    return products if outputs is None else jnp.where(number < outputs, products, -jnp.inf)


class Loss(NamedTuple):
    """What the loss is, see `SoftmaxHead` and `cross_entropy`; and the mesh axis that divides the
    outputs, if one does.
    """

    softcap: float | None
    outputs: int | None
    smoothing: float
    best: int
    axis: str | None
    first: int = 0

    def total(self, of_part: jax.Array) -> jax.Array:
        """The sum over the devices that divide the outputs."""
        return of_part if self.axis is None else jax.lax.psum(of_part, self.axis)

    def numbers(self, size: int) -> jax.Array:
        """Of this device's outputs, int32 [size]."""
        before = 0 if self.axis is None else jax.lax.axis_index(self.axis) * size
        return self.first + before + jnp.arange(size)


def whole(
    here: Loss,
    hidden_ND: jax.Array,
    weight: jax.Array,
    target_N: jax.Array,
    weight_N: jax.Array,
    by_output: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """The weighted sum of losses, and hits bool [N]. Vectors here are this device's own.

    Args:
      weight: [D, V].
      by_output: whether it is [V, D], and logits are [V, N], each output's together, not [N, V].
    """
    over = 0 if by_output else 1  # the outputs' axis
    size, total = weight.shape[over], here.total
    number_V = jnp.expand_dims(here.numbers(size), 1 - over)
    operands = (weight, hidden_ND.T) if by_output else (hidden_ND, weight)
    products = jnp.matmul(*operands, preferred_element_type=jnp.float32)
    logits = finish(products, number_V, here.softcap, here.outputs)

    def across(x_N: jax.Array) -> jax.Array:
        return jnp.expand_dims(x_N, over)

    highest_N = jnp.max(jax.lax.stop_gradient(logits), axis=over)
    if here.axis is not None:
        highest_N = jax.lax.pmax(highest_N, here.axis)
    sum_N = total(jnp.sum(jnp.exp(logits - across(highest_N)), axis=over))
    # Reductions over the outputs only, which may be divided: no gather of the target's logit.
    is_target = number_V == across(target_N)
    own_N = total(jnp.sum(jnp.where(is_target, logits, 0.0), axis=over))
    # For the best one alone, what is as high as the highest is counted along with the sum.
    above_N = highest_N if here.best == 1 else own_N
    rank_N = total(jnp.sum((logits >= across(above_N)).astype(jnp.float32), axis=over))
    hit_N = (own_N >= above_N) & (rank_N <= here.best)
    wanted_N = own_N
    if here.smoothing:
        exists_V = True if here.outputs is None else number_V < here.outputs
        all_N = total(jnp.sum(jnp.where(exists_V, logits, 0.0), axis=over))
        mean_N = all_N / (here.outputs or total(jnp.float32(size)))
        wanted_N = (1 - here.smoothing) * own_N + here.smoothing * mean_N
    return jnp.sum(weight_N * (highest_N + jnp.log(sum_N) - wanted_N)), hit_N


def in_one_pass(
    here: Loss, hidden_ND: jax.Array, weight_VD: jax.Array, target_N: jax.Array, weight_N: jax.Array
) -> tuple[tuple[jax.Array, jax.Array], tuple[jax.Array, jax.Array]]:
    """`whole` and its gradients by hidden and weight, of a loss without softcap and smoothing.

    Exponentials are of logits' distances from the target's own, which a gather and a sum give
    before any product; so the product that makes the logits also makes these and their sum, and
    nothing of the logits' size is kept but them, in the compute dtype. The gradients are products
    with them. Other outputs count as at most `FURTHEST` above the target's, so that a prediction
    costs no more than that and the log of how many; and those within `EQUAL` as equal to it.
    """
    number_V1 = here.numbers(len(weight_VD))[:, None]
    is_target = number_V1 == target_N
    place_N = target_N - number_V1[0, 0]
    own_vector_ND = weight_VD.at[place_N].get(
        mode="fill", fill_value=0, wrap_negative_indices=False
    )
    products_ND = hidden_ND.astype(jnp.float32) * own_vector_ND.astype(jnp.float32)
    own_N = here.total(jnp.sum(products_ND, axis=-1))
    products = jnp.matmul(weight_VD, hidden_ND.T, preferred_element_type=jnp.float32)
    # Said, or a v6e turns them where hidden states come of a lookup in the same weight.
    products = with_layout_constraint(products, Layout((0, 1)))
    above = finish(products, number_V1, None, here.outputs) - own_N
    share = jnp.exp(jnp.minimum(above, FURTHEST))
    # The target's own is 1; without it, where the weight is 0, all may be nothing.
    sum_N = jnp.maximum(here.total(jnp.sum(share, axis=0)), 1.0)
    others = ~(above <= -EQUAL) & ~is_target  # what is not a number is no hit
    others_N = here.total(jnp.sum(others.astype(jnp.float32), axis=0))
    # Without the barrier the products below would make them again, from logits in float32.
    kept = jax.lax.optimization_barrier(share.astype(hidden_ND.dtype))
    slope = jnp.where(is_target, kept.astype(jnp.float32) - sum_N, kept).astype(kept.dtype)
    scale_N1 = (weight_N / sum_N)[:, None]
    scaled_ND = (hidden_ND * scale_N1).astype(hidden_ND.dtype)
    exact = {"preferred_element_type": jnp.float32}
    by_hidden = (jnp.matmul(slope.T, weight_VD, **exact) * scale_N1).astype(hidden_ND.dtype)
    by_weight = jnp.matmul(slope, scaled_ND, **exact)
    loss = jnp.sum(weight_N * jnp.log(sum_N))
    return (loss, others_N < here.best), (by_hidden, by_weight)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def summed(here: Loss, *operands: jax.Array) -> tuple[jax.Array, jax.Array]:
    """As `whole`."""
    return _by_platform(_in_pieces, here, *operands)


def _forward(here: Loss, *operands: jax.Array) -> tuple[tuple, tuple]:
    return _by_platform(_in_pieces_with_gradients, here, *operands)


def _backward(here: Loss, gradients: tuple, cotangents: tuple) -> tuple:
    del here
    by_hidden, by_weight = ((x * cotangents[0]).astype(x.dtype) for x in gradients)
    return by_hidden, by_weight, None, None


summed.defvjp(_forward, _backward)


def _by_platform(function: Callable, here: Loss, *operands: jax.Array) -> Any:
    """Function with as many logits at once as the platform likes, in the order that it likes.

    TPUs sum faster along the first axis, where one pass is enough of most losses, and an
    embedding's gradient then has the embedding's layout (docs/pods.md); CPUs are 5% slower.
    """
    return jax.lax.platform_dependent(
        *operands,
        cpu=partial(function, here, CACHED_LOGITS, False),
        tpu=partial(function, here, MOST_LOGITS, True),
        default=partial(function, here, MOST_LOGITS, False),
    )


def _in_pieces(here: Loss, logits: int, by_output: bool, *operands: jax.Array) -> tuple:
    hidden_ND, weight_VD, target_N, weight_N = operands
    weight = weight_VD if by_output else weight_VD.T
    losses, hit = jax.lax.map(
        lambda piece: whole(here, piece[0], weight, *piece[1:], by_output),
        _pieces(logits, len(weight_VD), hidden_ND, target_N, weight_N),
    )
    return jnp.sum(losses), hit.reshape(-1)[: len(hidden_ND)]


def _in_pieces_with_gradients(
    here: Loss, logits: int, by_output: bool, *operands: jax.Array
) -> tuple:
    """Each piece's gradients are computed while its logits are at hand."""
    hidden_ND, weight_VD, target_N, weight_N = operands
    weight = weight_VD if by_output else weight_VD.T
    plain = here.softcap is None and not here.smoothing
    exact = all(x.dtype.name in ONE_PASS for x in (hidden_ND, weight_VD))
    if by_output and plain and exact:
        with_gradients = partial(in_one_pass, here)
    else:
        loss_and_hits = partial(whole, here, by_output=by_output)
        with_gradients = jax.value_and_grad(loss_and_hits, (0, 1), has_aux=True)

    def one(before: jax.Array, piece: tuple) -> tuple:
        (loss, hit), (by_hidden, by_weight) = with_gradients(piece[0], weight, *piece[1:])
        return before + by_weight, (loss, hit, by_hidden)

    nothing = jax.lax.full_like(weight, 0, dtype=jnp.float32)
    pieces = _pieces(logits, len(weight_VD), hidden_ND, target_N, weight_N)
    by_weight, (losses, hit, by_hidden) = jax.lax.scan(one, nothing, pieces)
    by_hidden = by_hidden.reshape(-1, hidden_ND.shape[1])[: len(hidden_ND)]
    by_weight = by_weight.astype(weight_VD.dtype)
    results = jnp.sum(losses), hit.reshape(-1)[: len(hidden_ND)]
    # Both before anything goes on, or what both are made of is held until the second is needed.
    by_hidden, by_weight = jax.lax.optimization_barrier((by_hidden, by_weight))
    return results, (by_hidden, by_weight if by_output else by_weight.T)


def _pieces(logits: int, outputs: int, *arrays: jax.Array) -> tuple[jax.Array, ...]:
    """Arrays [N, ...] as [pieces, predictions, ...], as even as can be, filled up with zeros."""
    predictions = len(arrays[0])
    most = max(logits // outputs, FEWEST_PREDICTIONS)
    size = -(-predictions // -(-predictions // most))
    missing = -predictions % size
    return tuple(
        jnp.pad(x, [(0, missing)] + [(0, 0)] * (x.ndim - 1)).reshape(-1, size, *x.shape[1:])
        for x in arrays
    )
