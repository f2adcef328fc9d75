"""Free generation against whole forward passes."""

import jax
import numpy as np
import pytest
from models import FAMILIES, make_model, prompts, whole_logits

from prefixmem_jax.inference.sampling import generate

NEW = 7


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_tokens_are_the_likeliest_after_each_whole_prefix(family):
    model, rows_at, catalog, rng = make_model((4, 3, 5), 25, True, 1, FAMILIES[family])
    histories = [rng.integers(0, 25, length) for length in (3, 1, 2, 0)]
    given = prompts(model, catalog, histories, 3)
    found = np.asarray(jax.jit(lambda p: generate(model, rows_at, p, NEW))(given))
    lengths = np.asarray(given.segment_ids).sum(axis=1)
    written = [
        np.r_[row[:n], new] for row, n, new in zip(given.tokens, lengths, found, strict=True)
    ]
    logits = whole_logits(model, rows_at, written)
    for row, length, new in zip(logits, lengths, found, strict=True):
        np.testing.assert_array_equal(row[length - 1 :][:NEW].argmax(axis=-1), new)


def test_nothing_is_written_after_an_end_token():
    model, rows_at, catalog, rng = make_model((4, 3, 5), 25, True, 1)
    given = prompts(model, catalog, [rng.integers(0, 25, length) for length in (3, 1, 2)], 3)
    whole = np.asarray(jax.jit(lambda p: generate(model, rows_at, p, NEW))(given))
    ends = tuple(map(int, whole[:2, 2]))
    stopped = np.asarray(jax.jit(lambda p: generate(model, rows_at, p, NEW, ends))(given))
    for row, full in zip(stopped, whole, strict=True):
        at = np.flatnonzero(np.isin(full, ends))
        length = at[0] + 1 if len(at) else NEW
        assert row[:length].tolist() == full[:length].tolist() and (row[length:] == -1).all()
    assert (stopped == -1).any()
