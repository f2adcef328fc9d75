"""What is alike: the same as comparing every item with every other, and of use where counts are few."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import sparse

from prefixmem_jax.data import similar_items as similar
from prefixmem_jax.data.similar_items import similar_items, words_of_items
from prefixmem_jax.data.transitions import smoothed
from prefixmem_jax.semantic_ids.catalog import Catalog
from prefixmem_jax.semantic_ids.space import SidSpace

WORDS = st.lists(st.sampled_from(["red", "blue", "lamp", "cup", "rug", "of"]), max_size=4)


@settings(max_examples=60, deadline=None)
@given(st.lists(WORDS, min_size=1, max_size=12), st.integers(1, 4))
def test_it_is_the_cosine_of_weighted_words(words, most):
    """By hand: 1 + log of the times in a title, times 1 + log of how few titles have the word."""
    names = sorted({word for one in words for word in one})
    times = np.array([[one.count(name) for name in names] for one in words], float)
    times = times.reshape(len(words), len(names))
    having = (times > 0).sum(axis=0)
    weights = np.where(times > 0, 1 + np.log(np.maximum(times, 1)), 0)
    weights = weights * (np.log((1 + len(words)) / (1 + having)) + 1)
    weights /= np.maximum(np.linalg.norm(weights, axis=1, keepdims=True), 1e-12)
    alike = weights @ weights.T
    np.fill_diagonal(alike, 0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(similar, "PIECE", 5)  # pieces do not show
        found = similar_items(words, most).toarray()
    for row, wanted in zip(found, alike, strict=True):
        kept = np.flatnonzero(row)
        assert len(kept) == min(most, (wanted > 1e-12).sum())
        if len(kept):  # the greatest, and their shares
            greatest = np.sort(wanted)[::-1][: len(kept)]
            np.testing.assert_allclose(np.sort(wanted[kept])[::-1], greatest)
            np.testing.assert_allclose(row[kept], wanted[kept] / greatest.sum())


def test_words_that_all_have_say_nothing(monkeypatch):
    monkeypatch.setattr(similar, "COMMON", 3)
    assert similar_items([["unknown"]] * 4, 8).nnz == 0
    some = similar_items([["unknown", "red"], ["unknown", "red"], ["unknown"], ["unknown"]], 8)
    np.testing.assert_array_equal(some.toarray()[:2, :2], [[0, 1], [1, 0]])
    assert some.nnz == 2


def test_prefixes_stand_for_words_where_there_are_no_titles():
    sids = np.array([[0, 1, 2], [0, 1, 3], [0, 2, 2], [1, 1, 2]])
    space = SidSpace((4, 4, 4))
    near = similar_items(words_of_items(Catalog(sids, [None] * 4, space)), 3).toarray()
    assert (
        near[0, 1] > near[0, 2] > 0 == near[0, 3] == near[3].sum()
    )  # codes of other prefixes differ
    titled = words_of_items(Catalog(sids, ["Red lamp", None, "lamp, red!", ""], space))
    assert titled == [["red", "lamp"], [], ["lamp", "red"], []]
    assert similar_items(titled, 3).toarray().tolist() == [
        [0, 0, 1, 0], [0] * 4, [1, 0, 0, 0], [0] * 4,
    ]  # fmt: skip


def test_many_counts_outweigh_titles_and_few_do_not():
    counts = sparse.csr_array(np.array([[0, 90.0, 0, 0], [0, 0, 1, 0], [0] * 4, [0] * 4]))
    alike = sparse.csr_array(np.array([[0, 0, 1.0, 0], [0, 0, 0, 1], [0.5, 0, 0, 0.5], [0] * 4]))
    near = smoothed(counts, alike, 10.0, 0.8, 0.0).toarray()
    shares = np.array([[0, 0.9, 0.1, 0], [0, 0, 1 / 11, 10 / 11], [0.5, 0, 0, 0.5], [0] * 4])
    sums = np.array([100, 11, 10, 0])[:, None]
    np.testing.assert_allclose(near, shares * sums**0.2, rtol=1e-6)
    unsmoothed = smoothed(counts, alike, 0.0, 0.8, 0.0).toarray()
    expected = [[0, 90**0.2, 0, 0], [0, 0, 1, 0], [0] * 4, [0] * 4]
    np.testing.assert_allclose(unsmoothed, expected, rtol=1e-6)
    # What stands next to everything says less.
    rarer = smoothed(counts, alike, 10.0, 0.8, 0.15).toarray()
    np.testing.assert_allclose(rarer, near / np.array([10, 100, 11, 10]) ** 0.15, rtol=1e-6)
