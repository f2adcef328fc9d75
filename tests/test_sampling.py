"""Free generation against whole forward passes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_beam_search import FAMILIES, make

from prefixmem_jax.data.sequences import prompt_rows
from prefixmem_jax.inference.sampling import generate

NEW = 7


def whole_logits(model, memory, tokens):
    tokens = jnp.asarray(tokens)
    ones = jnp.ones_like(tokens)
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    rows = None
    if memory is not None:
        rows = model.encoder.table.lookup(memory, model.encoder.addresses(tokens, ones))
    return np.asarray(model.next_token_logits(tokens, ones, positions, rows))


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_tokens_are_the_likeliest_after_each_whole_prefix(family):
    model, memory, catalog, rng = make((4, 3, 5), 25, True, 1, FAMILIES[family])
    histories = [rng.integers(0, 25, length) for length in (3, 1, 2)]
    rows = {k: jnp.asarray(v) for k, v in prompt_rows(catalog, histories, 3).items()}
    found = np.asarray(jax.jit(lambda p: generate(model, memory, p, NEW))(rows))
    for user, history in enumerate(histories):
        prompt = prompt_rows(catalog, [history], len(history))["tokens"][0]
        tokens = np.concatenate([prompt, found[user]])[None]
        logits = whole_logits(model, memory, tokens)[0, len(prompt) - 1 : -1]
        np.testing.assert_array_equal(logits.argmax(axis=-1), found[user])
    end = int(found[0, 2])
    stopped = np.asarray(jax.jit(lambda p: generate(model, memory, p, NEW, (end,)))(rows))
    for row, full in zip(stopped, found, strict=True):
        at = np.flatnonzero(full == end)
        length = at[0] + 1 if len(at) else NEW
        assert row[:length].tolist() == full[:length].tolist() and (row[length:] == -1).all()
    assert (stopped == -1).any()


def test_sampling_follows_the_distribution():
    model, memory, catalog, rng = make((4, 3, 5), 25, True, 2)
    history = rng.integers(0, 25, 2)
    rows = prompt_rows(catalog, [history] * 4000, 2)
    found = jax.jit(lambda p, key: generate(model, memory, p, 1, (), 1.5, key))(
        {k: jnp.asarray(v) for k, v in rows.items()}, jax.random.key(0)
    )
    logits = whole_logits(model, memory, rows["tokens"][:1])[0, -1] / 1.5
    expected = np.exp(logits) / np.exp(logits).sum()
    share = np.bincount(np.asarray(found)[:, 0], minlength=len(expected)) / 4000
    assert np.abs(share - expected).max() < 5 * np.sqrt(0.25 / 4000)
