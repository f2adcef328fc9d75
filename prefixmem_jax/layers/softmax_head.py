"""The softmax at the end: hidden states scored against one vector an output, and its loss."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from prefixmem_jax.layers.loss_in_pieces import Loss, finish, summed
from prefixmem_jax.parallel.sharding import by_vocabulary, constrain, einsum


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


class Losses(NamedTuple):
    """Of predictions [B, S].

    Attributes:
      loss: float32 [], the weighted sum of their cross-entropies.
      hit: bool [B, S], whether the target is among the best outputs. Equal logits count against
        it, or a model that says nothing would score full marks; in training on TPUs those within
        `loss_in_pieces.EQUAL` are equal.
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
      target_BS: int32; where the weight is 0 any number but of an output that fills V up.
      weight_BS: float32, of each prediction in the sum.
      smoothing: share of a target's probability that is spread evenly over the outputs.
      best: how many outputs are the best; more than one cost another pass over the logits.
    """

    def local(
        axis: str | None, hidden: jax.Array, vectors: jax.Array, of_batch: tuple
    ) -> tuple[jax.Array, jax.Array]:
        here = Loss(head.softcap, head.outputs, smoothing, best, axis, head.first)
        target, weight = of_batch
        flat = (hidden.reshape(-1, hidden.shape[-1]), vectors, target.reshape(-1))
        loss, hit = summed(here, *flat, weight.reshape(-1))
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
