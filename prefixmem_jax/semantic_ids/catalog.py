"""The catalogue: items, their SIDs and titles, and the way back from a SID to its items."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import numpy as np

from prefixmem_jax.semantic_ids.space import SidSpace
from prefixmem_jax.semantic_ids.trie import Trie


class Catalog:
    """Items 0..N-1 and the SIDs that name them.

    Several items may share a SID; such a set is a *group*. Groups are numbered in the
    lexicographic order of their SIDs.

    Attributes:
      sids: int32 [items, levels], codes without offset.
      titles: one string or None per item.
      space: the codebook sizes that the codes lie in.
      trie: of the SIDs; its leaves are the groups.
    """

    def __init__(self, sids: np.ndarray, titles: Sequence[str | None], space: SidSpace):
        self.sids = np.ascontiguousarray(sids, dtype=np.int32)
        self.titles = titles
        self.space = space
        self.trie = Trie(self.sids, space.codebook_sizes)
        self.group_of_item = self.trie.find(self.sids)
        self._items_by_group = np.argsort(self.group_of_item, kind="stable")
        self._group_starts = np.concatenate([[0], np.cumsum(self.trie.counts)])

    def __len__(self) -> int:
        return len(self.sids)

    def in_space(self, space: SidSpace) -> Catalog:
        """The same items, with tokens elsewhere in the vocabulary."""
        return Catalog(self.sids, self.titles, space)

    @property
    def group_sids(self) -> np.ndarray:
        """Distinct SIDs in lexicographic order, int32 [groups, levels]."""
        return self.trie.sids

    @property
    def group_sizes(self) -> np.ndarray:
        """Number of items per distinct SID, int64 [groups]."""
        return self.trie.counts

    @cached_property
    def tokens(self) -> np.ndarray:
        """SID tokens of every item, int32 [items, levels]."""
        return self.space.encode(self.sids)

    def groups(self, sids: np.ndarray) -> np.ndarray:
        """Numbers of the groups that SIDs [n, levels] name, -1 where no item has one."""
        return self.trie.find(sids)

    def items_of_group(self, group: int) -> np.ndarray:
        """Items that share the group's SID, in ascending order."""
        return self._items_by_group[self._group_starts[group] : self._group_starts[group + 1]]
