"""Beam search over SIDs, over all codes or only over the catalogue's, for any model of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp

from prefixmem_jax.inference.item_prior import Returning, item_prior
from prefixmem_jax.inference.transition_prior import TransitionPrior
from prefixmem_jax.semantic_ids.trie import TrieLevel


class Beams(NamedTuple):
    """The best SIDs per user, best first.

    Attributes:
      codes: int32 [users, beams, levels]; -1 where fewer SIDs exist than beams.
      scores: float32 [users, beams], sum over levels of the log-probability of the code among the
        codes of its level; -inf where exhausted.
    """

    codes: jax.Array
    scores: jax.Array


class SidModel(Protocol):
    """What the search asks of a model: a decoder, or an encoder-decoder, that predicts SIDs.

    `state` is any pytree; the search hands it back with the next call.
    """

    levels: int

    def start(self, prompts: Any) -> tuple[jax.Array, Any]:
        """Logits of c_1 after each user's prompt, float32 [users, codes]; and a state."""

    def step(self, codes: jax.Array, parent: jax.Array, state: Any) -> tuple[jax.Array, Any]:
        """Logits of the next code, float32 [users, beams, codes], and the next state.

        Args:
          codes: c_1..c_l of each beam, [users, beams, l].
          parent: beam of the call before that each beam goes on from, int32 [users, beams]; zeros
            in the first call.
        """

    def item_logits(self, state: Any) -> jax.Array:
        """Scores of whole items after each prompt, float32 [users, at least items].

        Asked for only where the caller says that the model has them.
        """


def beam_search(
    model: SidModel,
    prompts: Any,
    beams: int,
    trie: Sequence[TrieLevel] | None,
    returning: Returning | None = None,
    group_of_item: jax.Array | None = None,
    item_share: jax.Array | float = 0.0,
    transitions: TransitionPrior | None = None,
) -> Beams:
    """Decodes the next item after each prompt.

    No more beams are kept at a level than there are candidates for them.

    Args:
      trie: `Trie.levels`; allows only its SIDs. None allows every combination of codes.
      returning: what users have had and how often they come back: never leaves it out, else it
        counts for the scores of whole items (constrained only).
      group_of_item: leaf of every item, int32 [items], where the model scores whole items and these
        scores count too (constrained only).
      item_share: their share in a SID's score, 0 to 1.
      transitions: probabilities that a SID's is mixed with (constrained only).
    """
    logits, state = model.start(prompts)
    prior = None
    if trie is not None and group_of_item is not None:
        prior = item_prior(model.item_logits(state), group_of_item, trie, item_share, returning)
    # Prefixes of nothing but these would take the places of others, and end in nothing.
    had = None if returning is None else returning.nodes(trie)
    users = logits.shape[0]
    scores = jnp.zeros((users, 1))
    codes = jnp.zeros((users, 1, 0), jnp.int32)
    nodes = jnp.zeros((users, 1), jnp.int32)
    logits = logits[:, None]
    for level in range(1, model.levels + 1):
        candidates = extend(scores, nodes, logits, None if trie is None else trie[level - 1])
        if prior is not None:
            gained = candidates.scores - scores[..., None]
            gained = (1 - prior.share) * gained + prior.share * prior.gains(
                level, nodes, candidates.nodes
            )
            candidates = candidates._replace(
                scores=jnp.where(
                    jnp.isfinite(candidates.scores), scores[..., None] + gained, -jnp.inf
                )
            )
        if had is not None:
            among = candidates.nodes[..., None] == had[level - 1][:, None, None]
            gone = jnp.any(among, axis=-1) & (returning.rate == 0)
            candidates = candidates._replace(scores=jnp.where(gone, -jnp.inf, candidates.scores))
        by = candidates.scores
        if transitions is not None:
            by = transitions.mixed(level, by, candidates.nodes)
        found, parent, (scores, code, nodes) = keep_best(by, candidates, beams)
        codes = jnp.take_along_axis(codes, parent[..., None], axis=1)
        codes = jnp.concatenate([codes, code[..., None]], axis=-1)
        if level < model.levels:
            logits, state = model.step(codes, parent, state)
    missing = ((0, 0), (0, beams - found.shape[1]))
    found = jnp.pad(found, missing, constant_values=-jnp.inf)
    codes = jnp.pad(codes, (*missing, (0, 0)))
    return Beams(jnp.where(jnp.isfinite(found)[..., None], codes, -1), found)


class Candidates(NamedTuple):
    """Every way to go on from every beam, [users, beams, ways]: score, code, trie node."""

    scores: jax.Array
    codes: jax.Array
    nodes: jax.Array


@jax.named_scope("constraint")
def extend(
    scores: jax.Array, nodes: jax.Array, logits: jax.Array, trie: TrieLevel | None
) -> Candidates:
    """One level's candidates.

    Args:
      scores: [users, beams], -inf for exhausted beams; nodes: the trie node each stands on.
      logits: [users, beams, codes of this level].
    """
    if trie is None:
        gained = jax.nn.log_softmax(logits)
        code = jnp.broadcast_to(jnp.arange(logits.shape[-1], dtype=jnp.int32), logits.shape)
        return Candidates(scores[..., None] + gained, code, jnp.zeros_like(code))
    code, child, valid = trie.children(nodes)
    gained = jnp.take_along_axis(logits, code, axis=-1)
    gained -= jax.nn.logsumexp(logits, axis=-1, keepdims=True)
    return Candidates(jnp.where(valid, scores[..., None] + gained, -jnp.inf), code, child)


@jax.named_scope("top_k")
def keep_best(
    by: jax.Array, candidates: Candidates, beams: int
) -> tuple[jax.Array, jax.Array, Candidates]:
    """The best by some numbers: these, parent beams, and which, [users, at most beams] each.

    Args:
      by: [users, beams, ways].
    """
    users, before, ways = by.shape
    best, flat = jax.lax.top_k(by.reshape(users, -1), min(beams, before * ways))
    kept = jax.tree.map(
        lambda x: jnp.take_along_axis(x.reshape(users, -1), flat, axis=1), candidates
    )
    return best, flat // ways, kept
