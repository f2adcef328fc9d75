"""Which items are alike, by the words of their titles: what counts of interactions fall back on."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

import numpy as np
from scipy import sparse

from prefixmem_jax.progress import progress_bar
from prefixmem_jax.semantic_ids.catalog import Catalog

# Words that more items have say too little for what they cost in millions of items.
COMMON = 5000
# Items that are compared with all at a time.
PIECE = 1000
WORD = re.compile(r"\w\w+")


def words_of_items(catalog: Catalog) -> list[list[str]]:
    """Words of each item's title; where no title has any, the prefixes of its SID instead."""
    words = [WORD.findall((title or "").lower()) for title in catalog.titles]
    if any(words):
        return words
    return [
        [str(sid[:length]) for length in range(1, len(sid) + 1)] for sid in catalog.sids.tolist()
    ]


def similar_items(words: Sequence[Sequence[str]], most: int) -> sparse.csr_array:
    """How alike items are: float64 [items, items], each row the most similar, and one in sum.

    Cosine similarity of the words' TF-IDF. Rows of items that share no word with another are empty.

    Args:
      words: of each item.
      most: other items in a row, at most.
    """
    from sklearn.feature_extraction.text import TfidfVectorizer  # slow to import

    items = len(words)
    empty = sparse.csr_array((items, items))
    met = Counter(word for one in words for word in set(one))
    words = [[word for word in one if met[word] <= COMMON] for one in words]
    if not any(words):
        return empty
    weighing = TfidfVectorizer(analyzer=list, sublinear_tf=True)
    vectors = sparse.csr_array(weighing.fit_transform(words))
    rows, columns, alike = [], [], []
    with progress_bar(items, "comparing titles", "item") as bar:
        for start in range(0, items, PIECE):
            found = sparse.csr_array(vectors[start : start + PIECE] @ vectors.T)
            row = np.repeat(np.arange(found.shape[0]), np.diff(found.indptr)) + start
            others = row != found.indices
            row, column, value = row[others], found.indices[others], found.data[others]
            order = np.lexsort((column, -value, row))
            row, column, value = row[order], column[order], value[order]
            first = np.searchsorted(row, np.arange(start, start + found.shape[0]))
            kept = np.arange(len(row)) - first[row - start] < most
            rows.append(row[kept])
            columns.append(column[kept])
            alike.append(value[kept])
            bar.update(found.shape[0])
    row, column, value = map(np.concatenate, (rows, columns, alike))
    shares = value / np.bincount(row, value, items)[row]
    return empty + sparse.csr_array((shares, (row, column)), shape=(items, items))
