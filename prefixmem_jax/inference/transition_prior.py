"""What followed in training, mixed into a search over codes: its probability below every prefix."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from prefixmem_jax.inference.item_prior import Returning, by_level
from prefixmem_jax.semantic_ids.trie import TrieLevel


class TransitionTable(NamedTuple):
    """`data.transitions.Transitions` on devices: what stood next to each item most often.

    Attributes:
      neighbours: int32 [items, most], -1 for none; counts: float32 [items, most].
      decay: how much less an item says than the one after it.
      returns: how often users come back to an item.
    """

    neighbours: jax.Array
    counts: jax.Array
    decay: jax.Array
    returns: jax.Array


class TransitionPrior(NamedTuple):
    """What the counts say of prefixes.

    Attributes:
      mass: by level, float32 [users, nodes]: the probability of all SIDs below each trie node; all
        zero where nothing is known.
      share: of it in a SID's probability, float32 [users]; zero where nothing is known.
    """

    mass: list[jax.Array]
    share: jax.Array

    def mixed(self, level: int, scores: jax.Array, nodes: jax.Array) -> jax.Array:
        """Logs of (1 - share) * exp(scores) + share * mass, of nodes [users, beams, ways]."""
        users = scores.shape[0]
        share = self.share[:, None, None]
        mass = jnp.take_along_axis(self.mass[level - 1], nodes.reshape(users, -1), axis=1)
        mixed = jnp.logaddexp(
            jnp.log1p(-share) + scores, jnp.log(share * mass.reshape(nodes.shape))
        )
        return jnp.where(jnp.isfinite(scores), mixed, -jnp.inf)


def transition_prior(
    table: TransitionTable,
    recent: jax.Array,
    returning: Returning,
    group_of_item: jax.Array,
    trie: Sequence[TrieLevel],
    share: jax.Array | float,
) -> TransitionPrior:
    """The prior of users' last items.

    Args:
      recent: int32 [users, any], the newest last; -1 for none.
      returning: what users have had and how often they come back.
      group_of_item: the trie's leaf of every item, int32 [items].
    """
    users, length = recent.shape
    weight = jnp.where(recent >= 0, table.decay ** jnp.arange(length - 1, -1, -1.0), 0.0)
    neighbours = table.neighbours[recent]
    said = table.counts[recent] * weight[..., None]
    user = jnp.arange(users)[:, None]
    leaf = jnp.where(neighbours >= 0, group_of_item[neighbours], -1).reshape(users, -1)
    leaves = trie[-1].code.shape[0]
    mass = jnp.zeros((users, leaves + 1)).at[user, leaf].add(said.reshape(users, -1))
    mass = mass[:, :leaves]  # -1 is the place after the last leaf
    total = jnp.sum(mass, axis=1, keepdims=True)
    mass = mass / jnp.where(total > 0, total, 1.0)
    mass = mass * returning.factors(mass)
    known = jnp.any(mass > 0, axis=1)
    return TransitionPrior(by_level(mass, trie, _sums), jnp.where(known, share, 0.0))


def _sums(x: jax.Array, segment: jax.Array, segments: int) -> jax.Array:
    return jax.ops.segment_sum(x.T, segment, segments).T
