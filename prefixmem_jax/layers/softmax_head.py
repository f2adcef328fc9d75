"""The softmax at the end: hidden states scored against one vector an output, and its loss."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from prefixmem_jax.parallel.sharding import by_vocabulary, constrain, einsum

# Logits that are computed at a time: on a CPU so many that they stay in its cache, elsewhere so
# many that they and their gradients leave room (3 GiB each).
CACHED_LOGITS, MOST_LOGITS = 2**20, 3 * 2**28
# But never so few predictions that reading all outputs' vectors for them costs more than they do.
FEWEST_PREDICTIONS = 128


class SoftmaxHead(NamedTuple):
    """What hidden states are scored against.

    Attributes:
      weight: [D, V] in the compute dtype, gathered over fsdp.
      softcap: bound that logits are squeezed into, or None.
      outputs: those that exist; the others, which fill V up, score -inf. None: all.
      first: the number of the first one, where these are some of many.
    """

    weight: jax.Array
    softcap: float | None = None
    outputs: int | None = None
    first: int = 0

    def logits(self, hidden_BSD: jax.Array) -> jax.Array:
        """Float32 logits [B, S, V]."""
        logits_BSV = einsum(
            "BSD,DV->BSV",
            hidden_BSD,
            self.weight,
            out=("batch", None, "vocabulary"),
            preferred_element_type=jnp.float32,
        )
        number_V = constrain(self.first + jnp.arange(logits_BSV.shape[-1]), "vocabulary")
        return finish(logits_BSV, number_V, self.softcap, self.outputs)


def finish(
    products: jax.Array, number: jax.Array, softcap: float | None, outputs: int | None
) -> jax.Array:
    """Logits of dot products with the outputs of these numbers; see `SoftmaxHead`."""
    if softcap is not None:
        products = softcap * jnp.tanh(products / softcap)
    return products if outputs is None else jnp.where(number < outputs, products, -jnp.inf)


class Losses(NamedTuple):
    """Of predictions [B, S].

    Attributes:
      loss: float32 [], the weighted sum of their cross-entropies.
      hit: bool [B, S], whether the target is among the best outputs. Equal logits count against
        it, or a model that says nothing would score full marks.
    """

    loss: jax.Array
    hit: jax.Array


@jax.named_scope("loss")
def cross_entropy(
    hidden_BSD: jax.Array,
    head: SoftmaxHead,
    target_BS: jax.Array,
    weight_BS: jax.Array,
    smoothing: float = 0.0,
    best: int = 1,
) -> Losses:
    """Cross-entropy of targets after hidden states.

    Args:
      target_BS: int32; any number where the weight is 0.
      weight_BS: float32, of each prediction in the sum.
      smoothing: share of a target's probability that is spread evenly over the outputs.
      best: how many outputs are the best; more than one cost another pass over the logits.
    """

    def local(
        axis: str | None, hidden: jax.Array, vectors: jax.Array, of_batch: tuple
    ) -> tuple[jax.Array, jax.Array]:
        here = _Loss(head.softcap, head.outputs, smoothing, best, axis, head.first)
        target, weight = of_batch
        flat = (hidden.reshape(-1, hidden.shape[-1]), vectors, target.reshape(-1))
        loss, hit = _summed(here, *flat, weight.reshape(-1))
        return loss, hit.reshape(target.shape)

    return Losses(*by_vocabulary(local, hidden_BSD, head.weight.T, (target_BS, weight_BS)))


def sampled_cross_entropy(
    hidden_BPD: jax.Array,
    target_BPD: jax.Array,
    weight_DN: jax.Array,
    target_BP: jax.Array,
    drawn_N: jax.Array,
    expected_N: jax.Array,
    weight_BP: jax.Array,
) -> jax.Array:
    """Weighted sum of cross-entropies over the target and a few outputs that stand for the others.

    The log of its expected count is taken from the logit of each, so that the sum over them is
    right on average (logQ correction); one that is the target does not count.

    Args:
      target_BPD: the targets' vectors; target_BP: which outputs they are.
      weight_DN: vectors of the drawn outputs, in columns; those beyond `drawn_N` fill it up.
      expected_N: how many times each is drawn on average.
    """
    missing = weight_DN.shape[1] - len(drawn_N)
    often_N = jnp.pad(jnp.log(expected_N), (0, missing))
    logits_BPN = SoftmaxHead(weight_DN).logits(hidden_BPD) - constrain(often_N, "vocabulary")
    drawn_N = constrain(jnp.pad(drawn_N, (0, missing), constant_values=-1), "vocabulary")
    other = (drawn_N >= 0) & (drawn_N != target_BP[..., None])
    logits_BPN = jnp.where(other, logits_BPN, -jnp.inf)
    own_BP = jnp.sum(hidden_BPD.astype(jnp.float32) * target_BPD.astype(jnp.float32), axis=-1)
    all_BP = jnp.logaddexp(jax.nn.logsumexp(logits_BPN, axis=-1), own_BP)
    return jnp.sum((all_BP - own_BP) * weight_BP)


class _Loss(NamedTuple):
    """What the loss is, see `SoftmaxHead` and `cross_entropy`; and the mesh axis that divides the
    outputs, if one does.
    """

    softcap: float | None
    outputs: int | None
    smoothing: float
    best: int
    axis: str | None
    first: int = 0


def _whole(
    here: _Loss,
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

    def total(x: jax.Array) -> jax.Array:
        return x if here.axis is None else jax.lax.psum(x, here.axis)

    over = 0 if by_output else 1  # the outputs' axis
    size = weight.shape[over]
    first = here.first + (0 if here.axis is None else jax.lax.axis_index(here.axis) * size)
    number_V = jnp.expand_dims(first + jnp.arange(size), 1 - over)
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


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _summed(here: _Loss, *operands: jax.Array) -> tuple[jax.Array, jax.Array]:
    """As `_whole`."""
    return _by_platform(_in_pieces, here, *operands)


def _forward(here: _Loss, *operands: jax.Array) -> tuple[tuple, tuple]:
    return _by_platform(_in_pieces_with_gradients, here, *operands)


def _backward(here: _Loss, gradients: tuple, cotangents: tuple) -> tuple:
    del here
    by_hidden, by_weight = ((x * cotangents[0]).astype(x.dtype) for x in gradients)
    return by_hidden, by_weight, None, None


_summed.defvjp(_forward, _backward)


def _by_platform(function: Callable, here: _Loss, *operands: jax.Array) -> Any:
    """Function with as many logits at once as the platform likes, in the order that it likes.

    TPUs sum faster along the first axis, and an embedding's gradient then has the embedding's
    layout (docs/pods.md); CPUs are 5% slower.
    """
    return jax.lax.platform_dependent(
        *operands,
        cpu=partial(function, here, CACHED_LOGITS, False),
        tpu=partial(function, here, MOST_LOGITS, True),
        default=partial(function, here, MOST_LOGITS, False),
    )


def _in_pieces(here: _Loss, logits: int, by_output: bool, *operands: jax.Array) -> tuple:
    hidden_ND, weight_VD, target_N, weight_N = operands
    weight = weight_VD if by_output else weight_VD.T
    losses, hit = jax.lax.map(
        lambda piece: _whole(here, piece[0], weight, *piece[1:], by_output),
        _pieces(logits, len(weight_VD), hidden_ND, target_N, weight_N),
    )
    return jnp.sum(losses), hit.reshape(-1)[: len(hidden_ND)]


def _in_pieces_with_gradients(
    here: _Loss, logits: int, by_output: bool, *operands: jax.Array
) -> tuple:
    """Each piece's gradients are computed while its logits are at hand."""
    hidden_ND, weight_VD, target_N, weight_N = operands
    weight = weight_VD if by_output else weight_VD.T
    in_order = partial(_whole, here, by_output=by_output)
    whole = jax.value_and_grad(in_order, (0, 1), has_aux=True)

    def one(before: jax.Array, piece: tuple) -> tuple:
        (loss, hit), (by_hidden, by_weight) = whole(piece[0], weight, *piece[1:])
        return before + by_weight, (loss, hit, by_hidden)

    nothing = jax.lax.full_like(weight, 0, dtype=jnp.float32)
    pieces = _pieces(logits, len(weight_VD), hidden_ND, target_N, weight_N)
    by_weight, (losses, hit, by_hidden) = jax.lax.scan(one, nothing, pieces)
    by_hidden = by_hidden.reshape(-1, hidden_ND.shape[1])[: len(hidden_ND)]
    by_weight = by_weight.astype(weight_VD.dtype)
    results = jnp.sum(losses), hit.reshape(-1)[: len(hidden_ND)]
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
