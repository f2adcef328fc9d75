"""What every dataset format is read into."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from prefixmem_jax.semantic_ids.catalog import Catalog

# Named as the column of SIDs: every item's own id is its one code.
ITEM_ID = "item_id"


@dataclass(frozen=True)
class Histories:
    """User histories, oldest item first, as one flat array and offsets into it.

    Attributes:
      items: int64 [interactions].
      offsets: int64 [users + 1]; user u has items[offsets[u]:offsets[u + 1]].
      user_ids: one string per user.
      timestamps: int64 [interactions], ascending within a user, or None.
    """

    items: np.ndarray
    offsets: np.ndarray
    user_ids: Sequence[str]
    timestamps: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.user_ids)

    def of(self, user: int) -> np.ndarray:
        return self.items[self.offsets[user] : self.offsets[user + 1]]

    def piece(self, first: int, stop: int) -> Histories:
        """Of the users from the first up to the last: views."""
        offsets = self.offsets[first : stop + 1]
        here = slice(offsets[0], offsets[-1])
        times = None if self.timestamps is None else self.timestamps[here]
        return Histories(self.items[here], offsets - offsets[0], self.user_ids[first:stop], times)


class HistorySource(Protocol):
    """What gives `Histories` of some users: they themselves, or a file that is read by piece."""

    offsets: np.ndarray

    @property
    def timestamps(self) -> np.ndarray | None: ...

    def __len__(self) -> int: ...

    def piece(self, first: int, stop: int) -> Histories: ...


@dataclass(frozen=True)
class Dataset:
    """A catalogue, the histories over it, and the digest of the files they came from."""

    name: str
    catalog: Catalog
    histories: HistorySource
    sha256: str
