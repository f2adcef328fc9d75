"""Free generation, token by token with a cache: text after SIDs, or anything after anything."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from prefixmem_jax.data.batch import Batch
from prefixmem_jax.inference.cached_sid_lm import RowsAt, last_tokens, rows_for
from prefixmem_jax.layers.attention import Place
from prefixmem_jax.models.sid_lm import SidLM


def generate(
    model: SidLM,
    rows_at: RowsAt | None,
    prompts: Batch,
    new_tokens: int,
    end_tokens: Sequence[int] = (),
) -> jax.Array:
    """Continues every prompt by the likeliest token, again and again.

    Args:
      rows_at: reads the SID encoder's memory table; None where it owns none.
      prompts: one document a row, padded on the right.
      new_tokens: how many at most.
      end_tokens: end a row where one is generated.

    Returns:
      int32 [rows, new_tokens]; -1 after an end token.
    """
    tokens, segments = prompts.tokens, prompts.segment_ids
    size = tokens.shape[1]
    length = jnp.sum(segments > 0, axis=1)
    hidden, cache = model(prompts, rows_for(model, rows_at, tokens, segments))
    hidden = jnp.take_along_axis(hidden, (length - 1)[:, None, None], axis=1)
    room = ((0, 0), (0, 0), (0, new_tokens), (0, 0), (0, 0))
    cache = jax.tree.map(lambda kept: jnp.pad(kept, room), cache)
    # New tokens' places are known in advance; those not written yet lie in the future.
    later = length[:, None] + jnp.arange(new_tokens)
    keys = Place(
        jnp.concatenate([prompts.positions, later], axis=1),
        jnp.concatenate([segments, jnp.ones_like(later)], axis=1),
    )

    window, known = last_tokens(tokens, length, model.reach + 1)

    def one_token(carry: tuple, step: jax.Array) -> tuple:
        hidden, cache, window, known, done = carry
        logits = model.llm.softmax_head().logits(hidden)[:, 0]
        token = jnp.argmax(logits, axis=-1).astype(jnp.int32)
        written = jnp.where(done, -1, token)
        done |= jnp.isin(token, jnp.array(end_tokens, jnp.int32))
        window = jnp.concatenate([window[:, 1:], token[:, None]], axis=1)
        known = jnp.concatenate([known[:, 1:], jnp.ones_like(known[:, :1])], axis=1)
        x = model.embed(window, known, rows_for(model, rows_at, window, known, last=1), last=1)
        position = (length + step)[:, None]
        queries = Place(position, jnp.ones_like(position))
        hidden, cache = model.llm.extend(x, queries, cache, keys, size + step)
        return (hidden, cache, window, known, done), written

    start = (hidden, cache, window, known, length < 0)
    _, written = jax.lax.scan(one_token, start, jnp.arange(new_tokens))
    return written.T
