"""Lists of items from searched SIDs, and blends of two systems' lists."""

import numpy as np
import pytest

from prefixmem_jax.errors import UserError
from prefixmem_jax.evaluation.lists import (
    ItemLists,
    blend,
    item_lists,
    list_scores,
    load_lists,
    save_lists,
)
from prefixmem_jax.semantic_ids.catalog import Catalog
from prefixmem_jax.semantic_ids.space import SidSpace

# Items 1 and 3 share a SID.
CATALOG = Catalog(np.array([[0, 0], [1, 1], [0, 1], [1, 1]]), [None] * 4, SidSpace((2, 2)))


def lists(items, chances):
    return ItemLists(
        np.arange(len(items)), np.array(items, np.int32), np.log(np.array(chances, np.float32))
    )


def test_items_that_share_a_sid_share_its_probability(tmp_path):
    codes = np.array([[[1, 1], [0, 0], [1, 0]], [[0, 1], [-1, -1], [-1, -1]]], np.int32)
    scores = np.log(np.array([[0.6, 0.3, 0.1], [0.5, 0.0, 0.0]], np.float32) + 1e-30)
    found = item_lists(np.array([4, 7]), codes, scores, CATALOG)
    assert found.items.tolist() == [[1, 3, 0], [2, -1, -1]]
    np.testing.assert_allclose(np.exp(found.scores), [[0.3, 0.3, 0.3], [0.5, 0, 0]], atol=1e-6)
    save_lists(tmp_path, found)
    for ours, theirs in zip(load_lists(tmp_path), found, strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_a_blend_ranks_by_the_weighted_probabilities():
    first = lists([[0, 1, 2], [3, -1, -1]], [[0.4, 0.3, 0.3], [0.2, 1e-45, 1e-45]])
    second = lists([[2, 3, 1], [0, 1, 2]], [[0.05, 0.04, 0.01], [0.9, 0.06, 0.04]])
    found = blend(first, second, 0.5)
    # User 0: 0 has .2, 1 .15 + .05, 2 .15 + .25, 3 .2; of equals the lower id comes first.
    assert found.items.tolist() == [[2, 0, 1], [3, 0, 1]]
    np.testing.assert_allclose(np.exp(found.scores[0]), [0.4, 0.2, 0.2], rtol=1e-5)
    np.testing.assert_array_equal(blend(first, second, 0.0).items, first.items)
    np.testing.assert_array_equal(blend(first, second, 1.0).items, second.items)


def test_scores_of_lists_by_hand():
    found = list_scores(
        lists([[5, 2, 9, 1, 0], [1, 2, 3, 4, 5]], np.ones((2, 5))), np.array([9, 8])
    )
    assert found["item_recall@5/constrained"].tolist() == [1, 0]
    np.testing.assert_allclose(found["item_ndcg@5/constrained"], [1 / np.log2(4), 0])
    np.testing.assert_allclose(found["item_mrr@5/constrained"], [1 / 3, 0])


def test_blends_that_cannot_be_are_refused():
    one = lists([[0]], [[1.0]])
    with pytest.raises(UserError, match="of other users"):
        blend(one, one._replace(users=np.array([3])), 0.5)
    with pytest.raises(UserError, match="expected a share of 0 to 1, got 2"):
        blend(one, one, 2)
