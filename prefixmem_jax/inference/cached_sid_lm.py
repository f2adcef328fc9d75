"""A `SidLM` as the beam search asks for it: the prompt once, then a token per beam and level."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from prefixmem_jax.data.batch import Batch
from prefixmem_jax.layers.attention import KeyValues, Place
from prefixmem_jax.layers.softmax_head import SoftmaxHead
from prefixmem_jax.memory.table import Lookup
from prefixmem_jax.models.item_head import item_addresses, item_vectors
from prefixmem_jax.models.sid_lm import SidLM
from prefixmem_jax.parallel.sharding import on_tpus

# A TPU's tiles are so many rows high: sequences that fill them are laid end to end without a copy.
TPU_ROWS = 8
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
    addresses = model.addresses(tokens_BS, segment_ids_BS, last)
    return None if addresses is None else rows_at(addresses)


def read_items(model: SidLM, rows_at: RowsAt, tokens_IL: jax.Array) -> jax.Array:
    """The vectors that an item head which reads the memory scores items by: float32 [items, D]."""
    return item_vectors(model.sid_encoder, rows_at(item_addresses(model.sid_encoder, tokens_IL)))


def last_tokens(
    tokens_BS: jax.Array, length_B: jax.Array, count: int
) -> tuple[jax.Array, jax.Array]:
    """The last tokens of sequences, the newest at the end, and 1 where there is one: [B, count]."""
    at = length_B[:, None] + jnp.arange(-count, 0)
    return jnp.take_along_axis(tokens_BS, jnp.maximum(at, 0), axis=1), (at >= 0).astype(jnp.int32)


def _filled_up(x_BS: jax.Array) -> jax.Array:
    """With zeros to a multiple of TPU_ROWS."""
    return jnp.pad(x_BS, ((0, 0), (0, -x_BS.shape[1] % TPU_ROWS)))


class SearchState(NamedTuple):
    """What the search has computed so far.

    Attributes:
      prompt: keys and values of the prompts, shared by all beams.
      place: where the prompts' tokens stand.
      own: keys and values of each beam's c_1..c_l, [layers, users, beams, l, K, H].
      hidden: after each prompt, [users, 1, D].
      recent: the prompts' last tokens and whether there are so many, as far as the SID encoder of
        a beam's first code reaches, [users, reach] each.
    """

    prompt: KeyValues
    place: Place
    own: KeyValues
    hidden: jax.Array
    recent: tuple[jax.Array, jax.Array]


class CachedSidLM:
    """`inference.beam_search.SidModel` of a decoder and its memory.

    Only a beam's own tokens, at most levels - 1, are reordered as beams are chosen; the prompt's
    keys and values stay where they are.
    """

    def __init__(self, model: SidLM, rows_at: RowsAt | None, items_ID: jax.Array | None = None):
        """Takes what an item head that reads the memory reads there, where there is one."""
        self.model = model
        self.rows_at = rows_at
        self.items_ID = items_ID
        self.vocabulary = model.vocabulary
        self.levels = model.vocabulary.levels

    def start(self, prompts: Batch) -> tuple[jax.Array, SearchState]:
        """Runs prompts, one document a row, padded on the right."""
        if on_tpus():
            prompts = jax.tree.map(_filled_up, prompts)
        rows = rows_for(self.model, self.rows_at, prompts.tokens, prompts.segment_ids)
        hidden, cache = self.model(prompts, rows)
        length = jnp.sum(prompts.segment_ids > 0, axis=1)
        hidden = jnp.take_along_axis(hidden, length[:, None, None] - 1, axis=1)
        logits = self._code_logits(hidden, 1)[:, 0]
        prompt, own = self.model.llm.for_beams(cache)
        place = Place(prompts.positions, prompts.segment_ids)
        recent = last_tokens(prompts.tokens, length, self.model.reach)
        return logits, SearchState(prompt, place, own, hidden, recent)

    def item_logits(self, state: SearchState) -> jax.Array:
        """Scores of whole items after each prompt, by the item head."""
        dtype = state.hidden.dtype
        if self.items_ID is None:
            weight_DI = self.model.item_head.weight(None, Lookup(), dtype)
        else:
            weight_DI = self.items_ID.astype(dtype).T
        return SoftmaxHead(weight_DI).logits(state.hidden)[:, 0]

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
            self._embed_last(codes, state.recent),
            Place(positions, jnp.ones_like(positions)),
            state.prompt,
            state.place,
            own,
        )
        logits = self._code_logits(hidden, level + 1)
        return logits, state._replace(own=own)

    def _code_logits(self, hidden: jax.Array, level: int) -> jax.Array:
        """Logits [..., codes] of the codes of one level."""
        return self.model.llm.softmax_head(*self.vocabulary.token_range(level)).logits(hidden)

    def _embed_last(self, codes: jax.Array, recent: tuple[jax.Array, jax.Array]) -> jax.Array:
        """Decoder inputs [users, beams, D] of each beam's last token.

        The SID encoder sees the tokens before it that it sees in training.
        """
        users, beams, _ = codes.shape
        own = self.vocabulary.encode_prefix(codes)

        def before(own: jax.Array, recent: jax.Array) -> jax.Array:
            shared = jnp.broadcast_to(recent[:, None], (users, beams, recent.shape[1]))
            both = jnp.concatenate([shared, own], axis=2)[:, :, -(self.model.reach + 1) :]
            return both.reshape(users * beams, -1)

        window, segments = before(own, recent[0]), before(jnp.ones_like(own), recent[1])
        rows = rows_for(self.model, self.rows_at, window, segments, last=1)
        return self.model.embed(window, segments, rows, last=1).reshape(users, beams, -1)
