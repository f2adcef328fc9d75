"""What followed what in training: counts of items that stood near each other.

They remember exactly what a model that learns by gradients remembers in part; of items that were
met a few times they say what is alike (`data.similar_items`). Recommendations may mix in what they
say (`evaluation.transition_share`).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from zipfile import BadZipFile

import numpy as np
from scipy import sparse

from prefixmem_jax.data.splits import Split
from prefixmem_jax.errors import UserError
from prefixmem_jax.files import reading_npz, write_npz

FARTHEST = 15  # places apart that two items are still counted together


@dataclass(frozen=True)
class Transitions:
    """Scores of items next to the last ones of a history.

    Attributes:
      near: float [items, items], sparse: what an item of the history says of every other; see
        `smoothed`.
      decay: how much less each item says than the one after it.
      returns: see `return_rate`.
    """

    near: sparse.csr_array
    decay: float
    returns: float

    def scores(self, history: np.ndarray) -> np.ndarray:
        """sum over the history of decay ** (items since) * near: float64 [items]."""
        weights = self.decay ** np.arange(len(history) - 1, -1, -1)
        return self.near[np.asarray(history)].T @ weights

    def most_frequent(self, most: int) -> tuple[np.ndarray, np.ndarray]:
        """The first few neighbours of each item, int32 [items, n], -1 for none; float32 counts."""
        near, items = self.near.tocsr(), self.near.shape[0]
        item = np.repeat(np.arange(items), np.diff(near.indptr))
        order = np.lexsort((near.indices, -near.data, item))
        place = np.arange(len(order)) - near.indptr[item]
        kept = place < most
        width = max(1, int(place[kept].max(initial=0)) + 1)
        neighbours = np.full((items, width), -1, np.int32)
        counts = np.zeros((items, width), np.float32)
        neighbours[item[kept], place[kept]] = near.indices[order][kept]
        counts[item[kept], place[kept]] = near.data[order][kept]
        return neighbours, counts

    def save(self, path: Path) -> None:
        """Writes an .npz file."""
        write_npz(
            path,
            {
                "first": self.near.indptr.astype(np.int64),
                "neighbours": self.near.indices.astype(np.int32),
                "counts": self.near.data.astype(np.float32),
                "decay": np.float64(self.decay),
                "returns": np.float64(self.returns),
            },
        )

    @classmethod
    def load(cls, path: Path) -> Transitions:
        """Reads what `save` wrote; UserError names a file that is none."""
        try:
            with reading_npz(path) as saved:
                first, neighbours = saved["first"], saved["neighbours"]
                size = len(first) - 1
                near = sparse.csr_array((saved["counts"], neighbours, first), shape=(size, size))
                near.check_format()
                return cls(near, float(saved["decay"]), float(saved["returns"]))
        except (OSError, ValueError, KeyError, EOFError, BadZipFile) as error:
            raise UserError(f"{path}: not the transitions of a run ({error})") from None


def needed(transitions: Transitions | None) -> Transitions:
    """What a `transition_share` above 0 needs; UserError says where it comes from."""
    if transitions is None:
        raise UserError(
            "evaluation.transition_share is above 0, and the run has no transitions.npz; "
            "`prefixmem train` with that share and the run's --out writes it"
        )
    return transitions


def return_rate(split: Split) -> float:
    """Share of training's items, but for each sequence's first, that the sequence had before."""
    train = split.train
    user = np.repeat(np.arange(len(train)), train.lengths)
    met = np.unique(np.stack([user, split.items[train.indices()]]), axis=1).shape[1]
    later = len(user) - int(np.sum(train.lengths > 0))
    return (len(user) - met) / max(later, 1)


def following_counts(
    split: Split, items: int, fade: float, farthest: int = FARTHEST
) -> sparse.csr_array:
    """How often each item came after each in training: float64 [items, items].

    Args:
      fade: how much less an item counts than one that came a place earlier.
      farthest: places after an item that are counted.
    """
    at = split.train.indices()
    stop = np.repeat(split.train.stops, split.train.lengths)
    counts = sparse.csr_array((items, items))
    for away in range(1, farthest + 1):
        here = at + away < stop
        at, stop = at[here], stop[here]
        pairs = split.items[at], split.items[at + away]
        weights = np.full(len(at), fade ** (away - 1))
        counts += sparse.csr_array((weights, pairs), shape=(items, items))
    return counts


def smoothed(
    counts: sparse.csr_array,
    similar: sparse.csr_array,
    smoothing: float,
    own: float,
    other: float,
) -> sparse.csr_array:
    """What an item's neighbours are: float32 [items, items].

    Dirichlet smoothing: to the counts come so many more, spread over the items that are alike. So
    what was met often goes by its counts, and what was hardly met by its title.

    Args:
      similar: `similar_items`.
      smoothing: how many are added to an item's counts.
      own: power of an item's counts that what it says is divided by: below 1, what was met often
        says somewhat more than the other items of a history.
      other: power of the neighbour's counts: above 0, what stands next to everything says less.
    """
    both = (counts + smoothing * similar).tocsr()
    by_own, by_other = (
        np.maximum(np.asarray(counts.sum(axis=axis)).reshape(-1) + smoothing, 1e-12) ** -power
        for axis, power in ((1, own), (0, other))
    )
    near = sparse.diags_array(by_own) @ both @ sparse.diags_array(by_other)
    return sparse.csr_array(near, dtype=np.float32)
