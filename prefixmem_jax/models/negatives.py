"""Items that stand for all others in a sampled softmax.

One half is drawn alike from all items, the other by how often they occur (mixed negative sampling,
Yang et al. 2020): of a catalogue of which training meets a part, items drawn alike are hardly ever
what anybody chose.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from prefixmem_jax.semantic_ids.vocabulary import Vocabulary

# Shares of occurrences are in units of 1 / WHOLE.
WHOLE = 1 << 30


def draw(vocabulary: Vocabulary, key: jax.Array, count: int) -> jax.Array:
    """Items, each maybe several times: int32 [count].

    Where occurrences are not known all items count as met alike.
    """
    alike, by_occurrence = jax.random.split(key)
    half = count // 2
    of_all = jax.random.randint(alike, (count - half,), 0, vocabulary.items)
    place = jax.random.randint(by_occurrence, (half,), 0, WHOLE)
    ends = jnp.asarray(_ends(vocabulary))
    return jnp.concatenate([of_all, jnp.searchsorted(ends, place, side="right").astype(jnp.int32)])


def expected(vocabulary: Vocabulary, items: jax.Array, count: int) -> jax.Array:
    """How many times `draw` has each item on average: float32, of the shape of items."""
    half = count // 2
    ends = jnp.asarray(_ends(vocabulary))
    before = jnp.where(items > 0, ends[items - 1], 0)
    return (count - half) / vocabulary.items + half * ((ends[items] - before) / WHOLE)


def _ends(vocabulary: Vocabulary) -> np.ndarray:
    """Where each item's share of all occurrences ends, of WHOLE: int32 [items]."""
    counts = vocabulary.item_counts
    ends = np.cumsum(np.ones(vocabulary.items) if counts is None else counts, dtype=np.float64)
    return np.floor(ends * (WHOLE / ends[-1])).astype(np.int32)
