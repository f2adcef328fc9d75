"""The catalogue: items, their SIDs and titles, and the way back from a SID to its items."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import numpy as np

from prefixmem_jax.semantic_ids.space import SidSpace


class Catalog:
    """Items 0..N-1 and the SIDs that name them.

    Several items may share a SID; such a set is a *group*. Groups are numbered in the
    lexicographic order of their SIDs.

    Attributes:
      sids: int32 [items, levels], codes without offset.
      titles: one string or None per item.
      space: the codebook sizes that the codes lie in.
    """

    def __init__(self, sids: np.ndarray, titles: Sequence[str | None], space: SidSpace):
        self.sids = np.ascontiguousarray(sids, dtype=np.int32)
        self.titles = titles
        self.space = space
        order = np.lexsort(self.sids.T[::-1])
        ordered = self.sids[order]
        first = np.ones(len(ordered), bool)
        first[1:] = np.any(ordered[1:] != ordered[:-1], axis=1)
        self._items_by_group = order
        self._group_starts = np.append(np.flatnonzero(first), len(order))
        self.group_sids = ordered[first]
        self.group_of_item = np.empty(len(order), np.int64)
        self.group_of_item[order] = np.cumsum(first) - 1

    def __len__(self) -> int:
        return len(self.sids)

    def in_space(self, space: SidSpace) -> Catalog:
        """The same items, with tokens elsewhere in the vocabulary."""
        return Catalog(self.sids, self.titles, space)

    @property
    def group_sizes(self) -> np.ndarray:
        """Number of items per distinct SID, int64 [groups]."""
        return np.diff(self._group_starts)

    @cached_property
    def tokens(self) -> np.ndarray:
        """SID tokens of every item, int32 [items, levels]."""
        return self.space.encode(self.sids)

    @cached_property
    def _group_of_sid(self) -> dict[bytes, int]:
        return {sid.tobytes(): group for group, sid in enumerate(self.group_sids)}

    def group(self, sid: np.ndarray) -> int:
        """Number of the group that a SID [levels] names, or -1 where no item has it."""
        return self._group_of_sid.get(np.ascontiguousarray(sid, np.int32).tobytes(), -1)

    def items_of_group(self, group: int) -> np.ndarray:
        """Items that share the group's SID, in ascending order."""
        return self._items_by_group[self._group_starts[group] : self._group_starts[group + 1]]
