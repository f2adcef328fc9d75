"""The catalogue's SIDs as a prefix trie in flat arrays, for constrained decoding."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from prefixmem_jax.semantic_ids.catalog import Catalog


class TrieLevel(NamedTuple):
    """Children of all nodes at one depth.

    Attributes:
      first_child: int32 [nodes + 1]; node i's children are first_child[i]..first_child[i+1]-1,
        which are also their node numbers at the next depth.
      code: int32 [children], the code that leads to each child, ascending within a node.
      widest: the most children that a node has.
    """

    first_child: np.ndarray
    code: np.ndarray
    widest: int


class Trie:
    """All distinct SIDs of a catalogue; the leaves are its groups, in the same order."""

    def __init__(self, catalog: Catalog):
        sids = catalog.group_sids
        self.levels: list[TrieLevel] = []
        parent_of_row = np.zeros(len(sids), np.int64)
        for level in range(sids.shape[1]):
            new = np.ones(len(sids), bool)
            new[1:] = np.any(sids[1:, : level + 1] != sids[:-1, : level + 1], axis=1)
            counts = np.bincount(parent_of_row[new])
            first_child = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
            self.levels.append(TrieLevel(first_child, sids[new, level], int(counts.max())))
            parent_of_row = np.cumsum(new) - 1

    def children(self, level: int, nodes: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Children at a 1-based level of nodes [...] one level above.

        Returns:
          codes, child node numbers and validity, [..., widest]; where not valid the other two
          mean nothing.
        """
        first_child, code, widest = self.levels[level - 1]
        first_child, code = jnp.asarray(first_child), jnp.asarray(code)
        child = first_child[nodes][..., None] + jnp.arange(widest, dtype=jnp.int32)
        valid = child < first_child[nodes + 1][..., None]
        child = jnp.where(valid, child, 0)
        return code[child], child, valid
