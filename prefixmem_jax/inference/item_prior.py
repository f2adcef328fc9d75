"""The item head's say in a search over codes: its probability mass below every prefix."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from prefixmem_jax.semantic_ids.trie import TrieLevel

# A factor of none is as good as this, whose logarithm is a number.
NEVER = 1e-9


class ItemPrior(NamedTuple):
    """What items say of prefixes.

    Attributes:
      log_mass: by level, float32 [users, nodes]: log-probability of all items below each trie node.
      share: of it in a SID's score, in 0..1; the codes' log-probabilities have the rest.
    """

    log_mass: list[jax.Array]
    share: jax.Array | float

    def gains(self, level: int, nodes: jax.Array, children: jax.Array) -> jax.Array:
        """What going on from nodes [users, beams] to children [users, beams, ways] gains."""
        users = children.shape[0]
        mass = self.log_mass[level - 1]
        after = jnp.take_along_axis(mass, children.reshape(users, -1), axis=1)
        after = after.reshape(children.shape)
        if level == 1:
            return after
        return after - jnp.take_along_axis(self.log_mass[level - 2], nodes, axis=1)[..., None]


class Returning(NamedTuple):
    """What users have had already, and how often users come back to such.

    Attributes:
      leaves: of the trie, int32 [users, any]; -1 for none.
      rate: probability that the next item is one of them; zero leaves them out.
    """

    leaves: jax.Array
    rate: jax.Array

    def nodes(self, trie: Sequence[TrieLevel]) -> list[jax.Array]:
        """By level, the trie's nodes below which users have had every SID: int32 [users, any],
        filled up with a number that no node has.
        """
        nobody = jnp.iinfo(jnp.int32).max
        had = jnp.where(self.leaves >= 0, self.leaves, nobody)
        found = [had]
        for level in reversed(trie[1:]):
            first_child = jnp.asarray(level.first_child)
            parent = jnp.searchsorted(first_child, had, side="right") - 1
            parent = jnp.sort(jnp.where(had == nobody, nobody, parent), axis=1)
            first, stop = (
                jax.vmap(partial(jnp.searchsorted, side=side))(parent, parent)
                for side in ("left", "right")
            )
            children = first_child[parent + 1] - first_child[parent]
            whole = (stop - first == children) & (first == jnp.arange(parent.shape[1]))
            had = jnp.where(whole & (parent != nobody), parent, nobody).astype(jnp.int32)
            found.append(had)
        return found[::-1]

    def factors(self, mass: jax.Array) -> jax.Array:
        """What probabilities of leaves [users, leaves] are multiplied by, so that what was had has
        `rate` of them in all.

        Where one of both is impossible the other has it all; but nothing has any where only what is
        left out is possible.
        """
        users, leaves = mass.shape
        had = jnp.zeros((users, leaves + 1), bool)
        had = had.at[jnp.arange(users)[:, None], self.leaves].set(True)[:, :leaves]
        of_had = jnp.sum(mass, axis=1, keepdims=True, where=had)
        of_new = jnp.sum(mass, axis=1, keepdims=True, where=~had)
        to_had = jnp.where(of_new > 0, self.rate, jnp.ceil(self.rate))
        to_new = jnp.where(of_had > 0, 1 - self.rate, 1.0)
        to_had /= jnp.where(of_had > 0, of_had, 1.0)
        to_new /= jnp.where(of_new > 0, of_new, 1.0)
        return jnp.where(had, to_had, to_new)


def item_prior(
    item_logits: jax.Array,
    group_of_item: jax.Array,
    trie: Sequence[TrieLevel],
    share: jax.Array | float,
    returning: Returning | None = None,
) -> ItemPrior:
    """The prior of scores of whole items.

    Args:
      item_logits: float32 [users, at least items].
      group_of_item: the trie's leaf of every item, int32 [items].
    """
    log_p = jax.nn.log_softmax(item_logits[:, : len(group_of_item)], axis=-1)
    leaves = _log_sums(log_p, group_of_item, trie[-1].code.shape[0])
    if returning is not None:
        leaves = leaves + jnp.log(jnp.maximum(returning.factors(jnp.exp(leaves)), NEVER))
    return ItemPrior(by_level(leaves, trie, _log_sums), share)


def by_level(
    leaves: jax.Array, trie: Sequence[TrieLevel], sums: Callable[..., jax.Array]
) -> list[jax.Array]:
    """Numbers of the trie's leaves [users, leaves], and by level those of the nodes above them.

    Args:
      sums: of numbers [users, n], segments [n] and how many: sums [users, segments].
    """
    found = [leaves]
    for level in reversed(trie[1:]):
        nodes = level.first_child.shape[0] - 1
        children = jnp.arange(level.code.shape[0])
        parent = jnp.searchsorted(level.first_child, children, side="right") - 1
        found.append(sums(found[-1], parent, nodes))
    return found[::-1]


def _log_sums(log_p: jax.Array, segment: jax.Array, segments: int) -> jax.Array:
    """Logs of the sums of exp(log_p) [users, n] by segment [n]: [users, segments]."""
    highest = jax.ops.segment_max(log_p.T, segment, segments)
    sums = jax.ops.segment_sum(jnp.exp(log_p.T - highest[segment]), segment, segments)
    return (highest + jnp.log(sums)).T
