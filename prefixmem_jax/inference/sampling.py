"""Free generation, token by token with a cache: text after SIDs, or anything after anything."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from prefixmem_jax.models.decoder import Cache
from prefixmem_jax.models.sid_lm import SidLM


def generate(
    model: SidLM,
    memory: jax.Array | None,
    prompts: dict[str, jax.Array],
    new_tokens: int,
    end_tokens: Sequence[int] = (),
    temperature: float = 0.0,
    key: jax.Array | None = None,
) -> jax.Array:
    """Continues every prompt.

    Args:
      memory: the encoder's table, whole on this device.
      prompts: batch of `data.sequences.prompt_rows`: one document a row, padded on the right.
      new_tokens: how many at most.
      end_tokens: end a row where one is generated.
      temperature: 0 takes the likeliest token; above, tokens are drawn from
        softmax(logits / temperature) with `key`.

    Returns:
      int32 [rows, new_tokens]; -1 after an end token.
    """
    tokens, segment_ids = prompts["tokens"], prompts["segment_ids"]
    size = tokens.shape[1]
    inside = segment_ids > 0
    length = jnp.sum(inside, axis=1)
    memory_rows = model.read_memory(memory, tokens, segment_ids)
    hidden, cache = model(tokens, segment_ids, prompts["positions"], memory_rows)
    hidden = jnp.take_along_axis(hidden, (length - 1)[:, None, None], axis=1)
    room = ((0, 0), (0, 0), (0, new_tokens), (0, 0), (0, 0))
    cache = jax.tree.map(lambda kept: jnp.pad(kept, room), cache)
    later = length[:, None] + jnp.arange(new_tokens)
    slot_positions = jnp.concatenate([prompts["positions"], later], axis=1)
    slots = jnp.arange(size + new_tokens)

    # What a prefix can reach back to: the last tokens, the newest at the end.
    levels = model.space.levels
    back = length[:, None] + jnp.arange(-levels, 0)
    window = jnp.take_along_axis(tokens, jnp.maximum(back, 0), axis=1)
    known = (back >= 0).astype(jnp.int32)

    def choose(hidden: jax.Array, step: jax.Array) -> jax.Array:
        logits = model.llm.logits(hidden)[:, 0]
        if temperature == 0:
            return jnp.argmax(logits, axis=-1).astype(jnp.int32)
        drawn = jax.random.categorical(jax.random.fold_in(key, step), logits / temperature)
        return drawn.astype(jnp.int32)

    def one_token(carry: tuple, step: jax.Array) -> tuple:
        hidden, cache, window, known, done = carry
        token = choose(hidden, step)
        written = jnp.where(done, -1, token)
        done |= jnp.isin(token, jnp.array(end_tokens, jnp.int32))
        window = jnp.concatenate([window[:, 1:], token[:, None]], axis=1)
        known = jnp.concatenate([known[:, 1:], jnp.ones_like(known[:, :1])], axis=1)
        newest = model.read_memory(memory, window, known)
        x = model.embed(token[:, None], None if newest is None else newest[:, -1:])
        visible = jnp.pad(inside, ((0, 0), (0, new_tokens)))
        visible |= (slots >= size) & (slots <= size + step)
        hidden, cache = model.llm(
            x,
            (length + step)[:, None],
            visible[:, None],
            cache,
            size + step,
            slot_positions,
        )
        return (hidden, Cache(*cache), window, known, done), written

    start = (hidden, cache, window, known, length < 0)
    _, written = jax.lax.scan(one_token, start, jnp.arange(new_tokens))
    return written.T
