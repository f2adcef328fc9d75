"""Beam search over SIDs, over all codes or only over the catalogue's."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

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
    """Decodes the next item after each prompt.

    The prompt runs once per user and its keys and values serve all beams. Each later level runs
    one new token per beam; a beam attends to the prompt and, by index, to its own ancestors
    among the tokens generated so far, so the cache is never reordered.

    Args:
      memory: the encoder's table, whole on this device.
      prompts: batch of `data.sequences.prompt_rows`.
      trie: allows only its SIDs; None allows every combination of codes.
    """
    space = model.space
    users, prompt_size = prompts["tokens"].shape
    in_prompt = prompts["segment_ids"] > 0
    length_U = jnp.sum(in_prompt, axis=1)
    hidden, cache = _prefill(model, memory, prompts)
    last_UD = jnp.take_along_axis(hidden, (length_U - 1)[:, None, None], axis=1)[:, 0]
    generated = beams * (space.levels - 1)
    cache = jax.tree.map(
        lambda kept: jnp.pad(kept, ((0, 0), (0, 0), (0, generated), (0, 0), (0, 0))), cache
    )
    slots = jnp.arange(prompt_size + generated)
    prompt_mask = jnp.pad(in_prompt, ((0, 0), (0, generated)))

    later_US = length_U[:, None] + jnp.arange(generated) // beams
    slot_positions = jnp.concatenate([prompts["positions"], later_US], axis=1)

    codes = jnp.full((users, beams, space.levels), -1, jnp.int32)
    nodes = jnp.zeros((users, beams), jnp.int32)
    ancestors = jnp.zeros((users, beams, 0), jnp.int32)  # slots of c_1..c_l of each beam
    scores = jnp.full((users, beams), -jnp.inf).at[:, 0].set(0.0)
    beam_hidden = jnp.broadcast_to(last_UD[:, None], (users, beams, last_UD.shape[-1]))

    for level in range(1, space.levels + 1):
        logits = model.llm.logits(beam_hidden, *space.token_range(level))
        scores, codes, nodes, parent = extend(
            level, scores, codes, nodes, jax.nn.log_softmax(logits), trie
        )
        if level == space.levels:
            break
        start = prompt_size + (level - 1) * beams
        own = jnp.broadcast_to(start + jnp.arange(beams, dtype=jnp.int32), (users, beams))
        ancestors = jnp.take_along_axis(ancestors, parent[..., None], axis=1)
        ancestors = jnp.concatenate([ancestors, own[..., None]], axis=-1)
        visible = jnp.any(slots == ancestors[..., None], axis=2) | prompt_mask[:, None]
        x = _embed_last(model, memory, codes[..., :level])
        positions = jnp.broadcast_to((length_U + level - 1)[:, None], (users, beams))
        beam_hidden, cache = model.llm(x, positions, visible, cache, start, slot_positions)
    return Beams(jnp.where(jnp.isfinite(scores)[..., None], codes, -1), scores)


def _prefill(model: SidLM, memory: jax.Array | None, prompts: dict[str, jax.Array]) -> tuple:
    tokens, segment_ids = prompts["tokens"], prompts["segment_ids"]
    memory_rows = None
    if model.encoder is not None:
        memory_rows = model.encoder.table.read(memory, model.encoder.addresses(tokens, segment_ids))
    return model(tokens, segment_ids, prompts["positions"], memory_rows)


def _embed_last(model: SidLM, memory: jax.Array | None, codes: jax.Array) -> jax.Array:
    """Decoder inputs [users, beams, D] of each beam's last token.

    The encoder sees the beam's true prefix, as the window of tokens that it is in training.
    """
    users, beams, level = codes.shape
    window = jnp.stack(
        [codes[..., i] + model.space.token_range(i + 1)[0] for i in range(level)], axis=-1
    ).reshape(users * beams, level)
    memory_rows = None
    if model.encoder is not None:
        addresses = model.encoder.addresses(window, jnp.ones_like(window))[:, -1]
        memory_rows = model.encoder.table.read(memory, addresses.reshape(users, beams, -1))
    return model.embed(window[:, -1].reshape(users, beams), memory_rows)


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
