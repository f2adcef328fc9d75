"""A `SidLM` as the beam search asks for it: the prompt once, then a token per beam and level."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from prefixmem_jax.models.decoder import Branches, Cache
from prefixmem_jax.models.sid_lm import SidLM


class SearchState(NamedTuple):
    """What the search has computed so far.

    Attributes:
      prompt: keys and values of the prompts, shared by all beams.
      prompt_mask: bool [users, length]; `prompt_positions` likewise.
      generated: keys and values of every token that was a beam's last, in the order computed.
      ancestors: places among them of each beam's c_1..c_l, int32 [users, beams, l].
    """

    prompt: Cache
    prompt_mask: jax.Array
    prompt_positions: jax.Array
    generated: Cache
    ancestors: jax.Array


class CachedSidLM:
    """`decoding.beam_search.SidModel` of a decoder and its memory.

    Keys and values are never reordered: a beam finds its own past by index.

    Args:
      memory: the encoder's table: whole, or inside `shard_map` this device's part of it.
    """

    def __init__(self, model: SidLM, memory: jax.Array | None):
        self.model = model
        self.memory = memory
        self.space = model.space
        self.levels = model.space.levels

    def start(self, prompts: dict[str, jax.Array]) -> tuple[jax.Array, SearchState]:
        """Runs prompts, a batch of `data.sequences.prompt_rows`."""
        tokens, segment_ids = prompts["tokens"], prompts["segment_ids"]
        rows = self.model.read_memory(self.memory, tokens, segment_ids)
        hidden, cache = self.model(tokens, segment_ids, prompts["positions"], rows)
        mask = segment_ids > 0
        last = jnp.sum(mask, axis=1) - 1
        hidden = jnp.take_along_axis(hidden, last[:, None, None], axis=1)
        logits = self.model.llm.logits(hidden, *self.space.token_range(1))[:, 0]
        nothing = jax.tree.map(lambda kept: kept[:, :, :0], cache)
        ancestors = jnp.zeros((len(tokens), 1, 0), jnp.int32)
        return logits, SearchState(cache, mask, prompts["positions"], nothing, ancestors)

    def step(
        self, codes: jax.Array, parent: jax.Array, state: SearchState
    ) -> tuple[jax.Array, SearchState]:
        """Runs the last code of every beam."""
        users, beams, level = codes.shape
        own = jnp.arange(beams, dtype=jnp.int32) + state.generated.keys.shape[2]
        ancestors = jnp.take_along_axis(state.ancestors, parent[..., None], axis=1)
        own = jnp.broadcast_to(own[:, None], (users, beams, 1))
        ancestors = jnp.concatenate([ancestors, own], axis=-1)
        length = jnp.sum(state.prompt_mask, axis=1)[:, None]
        positions = jnp.broadcast_to(length + level - 1, (users, beams))
        branch_positions = (length + jnp.arange(level))[:, None]
        branches = Branches(
            state.generated, ancestors, jnp.broadcast_to(branch_positions, ancestors.shape)
        )
        mask = jnp.broadcast_to(
            state.prompt_mask[:, None], (users, beams, state.prompt_mask.shape[1])
        )
        hidden, new = self.model.llm(
            self._embed_last(codes),
            positions,
            mask,
            state.prompt,
            key_positions_BT=state.prompt_positions,
            branches=branches,
        )
        generated = jax.tree.map(
            lambda old, more: jnp.concatenate([old, more], axis=2), state.generated, new
        )
        logits = self.model.llm.logits(hidden, *self.space.token_range(level + 1))
        return logits, state._replace(generated=generated, ancestors=ancestors)

    def _embed_last(self, codes: jax.Array) -> jax.Array:
        """Decoder inputs [users, beams, D] of each beam's last token.

        The encoder sees the beam's true prefix, as the window of tokens that it is in training.
        """
        users, beams, level = codes.shape
        window = jnp.stack(
            [codes[..., i] + self.space.token_range(i + 1)[0] for i in range(level)], axis=-1
        ).reshape(users * beams, level)
        encoder, rows = self.model.encoder, None
        if encoder is not None:
            addresses = encoder.addresses(window, jnp.ones_like(window))[:, -1]
            rows = encoder.table.read(self.memory, addresses.reshape(users, beams, -1))
        return self.model.embed(window[:, -1].reshape(users, beams), rows)
