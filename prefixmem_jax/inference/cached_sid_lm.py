"""A `SidLM` as the beam search asks for it: the prompt once, then a token per beam and level."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from prefixmem_jax.data.batch import Batch
from prefixmem_jax.layers.attention import KeyValues, Place
from prefixmem_jax.models.sid_lm import SidLM

# Memory rows float32 [..., width] at addresses [...]: `Table.gather` with the table where it lies.
RowsAt = Callable[[jax.Array], jax.Array]


def rows_for(
    model: SidLM,
    rows_at: RowsAt | None,
    tokens_BS: jax.Array,
    segment_ids_BS: jax.Array,
    last: int | None = None,
) -> jax.Array | None:
    """The rows that the SID encoder wants at the last positions (None: all), if it owns a table."""
    addresses = model.addresses(tokens_BS, segment_ids_BS)
    if addresses is None:
        return None
    return rows_at(addresses if last is None else addresses[:, -last:])


class SearchState(NamedTuple):
    """What the search has computed so far.

    Attributes:
      prompt: keys and values of the prompts, shared by all beams.
      place: where the prompts' tokens stand.
      own: keys and values of each beam's c_1..c_l, [layers, users, beams, l, K, H].
    """

    prompt: KeyValues
    place: Place
    own: KeyValues


class CachedSidLM:
    """`inference.beam_search.SidModel` of a decoder and its memory.

    Only a beam's own tokens, at most levels - 1, are reordered as beams are chosen; the prompt's
    keys and values stay where they are.
    """

    def __init__(self, model: SidLM, rows_at: RowsAt | None):
        self.model = model
        self.rows_at = rows_at
        self.vocabulary = model.vocabulary
        self.levels = model.vocabulary.levels

    def start(self, prompts: Batch) -> tuple[jax.Array, SearchState]:
        """Runs prompts, one document a row, padded on the right."""
        rows = rows_for(self.model, self.rows_at, prompts.tokens, prompts.segment_ids)
        hidden, cache = self.model(prompts, rows)
        last = jnp.sum(prompts.segment_ids > 0, axis=1) - 1
        hidden = jnp.take_along_axis(hidden, last[:, None, None], axis=1)
        logits = self.model.llm.logits(hidden, *self.vocabulary.token_range(1))[:, 0]
        own = jax.tree.map(lambda kept: kept[:, :, :1, None][:, :, :, :0], cache)
        return logits, SearchState(cache, Place(prompts.positions, prompts.segment_ids), own)

    def step(
        self, codes: jax.Array, parent: jax.Array, state: SearchState
    ) -> tuple[jax.Array, SearchState]:
        """Runs the last code of every beam."""
        users, beams, level = codes.shape
        own = jax.tree.map(
            lambda kept: jnp.take_along_axis(kept, parent[None, :, :, None, None, None], axis=2),
            state.own,
        )
        length = jnp.sum(state.place.segments > 0, axis=1)[:, None]
        positions = jnp.broadcast_to(length + level - 1, (users, beams))
        hidden, own = self.model.llm.extend_beams(
            self._embed_last(codes),
            Place(positions, jnp.ones_like(positions)),
            state.prompt,
            state.place,
            own,
        )
        logits = self.model.llm.logits(hidden, *self.vocabulary.token_range(level + 1))
        return logits, state._replace(own=own)

    def _embed_last(self, codes: jax.Array) -> jax.Array:
        """Decoder inputs [users, beams, D] of each beam's last token.

        The SID encoder sees the beam's true prefix, as the window of tokens that it is in training.
        """
        users, beams, level = codes.shape
        window = self.vocabulary.encode_prefix(codes).reshape(users * beams, level)
        segments = jnp.ones_like(window)
        rows = rows_for(self.model, self.rows_at, window, segments, last=1)
        return self.model.embed(window, segments, rows, last=1).reshape(users, beams, -1)
