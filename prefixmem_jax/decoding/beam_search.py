"""Beam search over SIDs, over all codes or only over the catalogue's."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from prefixmem_jax.memory import table
from prefixmem_jax.models.sid_lm import SidLM
from prefixmem_jax.semantic_ids.trie import Trie


class Beams(NamedTuple):
    """The best SIDs per user, best first.

    Attributes:
      codes: int32 [users, beams, levels]; -1 where fewer SIDs exist than beams.
      scores: float32 [users, beams], sum over levels of the log-probability of the code among
        the codes that its level (or, constrained, the trie) allows at all; -inf where exhausted.
    """

    codes: jax.Array
    scores: jax.Array


def beam_search(
    model: SidLM,
    memory: jax.Array | None,
    prompts: dict[str, jax.Array],
    beams: int,
    trie: Trie | None,
) -> Beams:
    """Decodes the next item after each prompt; runs the whole sequence at every level.

    Args:
      memory: the encoder's table, whole on this device.
      prompts: batch of `data.sequences.prompt_rows`.
      trie: allows only its SIDs; None allows every combination of codes.
    """
    space = model.space
    users = prompts["tokens"].shape[0]
    length_U = jnp.sum(prompts["segment_ids"] > 0, axis=1)
    room = ((0, 0), (0, space.levels))
    tokens = jnp.repeat(jnp.pad(prompts["tokens"], room), beams, axis=0)
    row_length = jnp.repeat(length_U, beams)
    place = jnp.arange(tokens.shape[1])
    codes = jnp.full((users, beams, space.levels), -1, jnp.int32)
    nodes = jnp.zeros((users, beams), jnp.int32)
    scores = jnp.full((users, beams), -jnp.inf).at[:, 0].set(0.0)

    for level in range(1, space.levels + 1):
        segment_ids = (place < (row_length + level - 1)[:, None]).astype(jnp.int32)
        positions = jnp.broadcast_to(place, tokens.shape)
        memory_rows = None
        if model.encoder is not None:
            memory_rows = table.lookup(memory, model.encoder.addresses(tokens, segment_ids))
        hidden, _ = model(tokens, segment_ids, positions, memory_rows)
        last = jnp.take_along_axis(hidden, (row_length + level - 2)[:, None, None], axis=1)[:, 0]
        first_token, stop_token = space.token_range(level)
        log_probability = jax.nn.log_softmax(model.llm.logits(last, first_token, stop_token))
        log_probability = log_probability.reshape(users, beams, -1)
        scores, codes, nodes, parent = extend(
            level, scores, codes, nodes, log_probability, trie
        )
        tokens = tokens.reshape(users, beams, -1)
        tokens = jnp.take_along_axis(tokens, parent[..., None], axis=1).reshape(users * beams, -1)
        chosen = (codes[..., level - 1] + first_token).reshape(-1)
        tokens = jnp.where(place == (row_length + level - 1)[:, None], chosen[:, None], tokens)
    return Beams(jnp.where(jnp.isfinite(scores)[..., None], codes, -1), scores)


def extend(
    level: int,
    scores: jax.Array,
    codes: jax.Array,
    nodes: jax.Array,
    log_probability: jax.Array,
    trie: Trie | None,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Extends every beam by one level and keeps the best.

    Args:
      scores: [users, beams], -inf for exhausted beams; codes: [users, beams, levels]; nodes:
        [users, beams], the trie node each beam stands on.
      log_probability: [users, beams, codes of this level].

    Returns:
      The new scores, codes and nodes, and the beam that each came from, [users, beams].
    """
    users, beams = scores.shape
    if trie is None:
        candidate = scores[..., None] + log_probability
        code = jnp.broadcast_to(jnp.arange(candidate.shape[-1]), candidate.shape)
        child = jnp.zeros_like(code)
    else:
        code, child, valid = trie.children(level, nodes)
        gained = jnp.take_along_axis(log_probability, code, axis=-1)
        candidate = jnp.where(valid, scores[..., None] + gained, -jnp.inf)
    width = candidate.shape[-1]
    scores, flat = jax.lax.top_k(candidate.reshape(users, beams * width), beams)
    parent = flat // width

    def pick(x: jax.Array) -> jax.Array:
        return jnp.take_along_axis(x.reshape(users, beams * width), flat, axis=1)

    codes = jnp.take_along_axis(codes, parent[..., None], axis=1)
    return scores, codes.at[..., level - 1].set(pick(code)), pick(child), parent
