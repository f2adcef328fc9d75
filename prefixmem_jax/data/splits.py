"""Splits of user histories into training sequences and held-out next-item examples.

All are index ranges over the one flat array of interactions: nothing is copied, and nothing is
kept in Python objects by user.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np

from prefixmem_jax.data.dataset import Dataset, Histories, HistorySource
from prefixmem_jax.errors import UserError


@dataclass(frozen=True)
class Ranges:
    """Sequences as index ranges: sequence i is items[starts[i]:stops[i]]; int64 both."""

    starts: np.ndarray
    stops: np.ndarray

    def __len__(self) -> int:
        return len(self.starts)

    @property
    def lengths(self) -> np.ndarray:
        """Items of every sequence, int64 [sequences]."""
        return self.stops - self.starts

    def take(self, indices: np.ndarray) -> Ranges:
        """Some of the sequences, in the order of `indices`."""
        return Ranges(self.starts[indices], self.stops[indices])

    def indices(self) -> np.ndarray:
        """Indices of all sequences, one after the other, int64 [sum of lengths]."""
        before = np.cumsum(self.lengths) - self.lengths
        return np.repeat(self.starts - before, self.lengths) + np.arange(self.lengths.sum())


@dataclass(frozen=True)
class Examples:
    """Predict an item from the history right before it, oldest first.

    Attributes:
      items: all interactions, int64.
      users: int64 [examples].
      starts: where each history starts in items, int64 [examples].
      targets_at: where each target is, which is where its history ends, int64 [examples].
    """

    items: np.ndarray
    users: np.ndarray
    starts: np.ndarray
    targets_at: np.ndarray

    def __len__(self) -> int:
        return len(self.users)

    @property
    def targets(self) -> np.ndarray:
        """Items to predict, int64 [examples]."""
        return self.items[self.targets_at]

    def history(self, example: int) -> np.ndarray:
        """The items before an example's target: a view."""
        return self.items[self.starts[example] : self.targets_at[example]]

    def histories(self) -> list[np.ndarray]:
        """Every example's history: views."""
        return [self.history(example) for example in range(len(self))]

    def take(self, indices: np.ndarray | slice) -> Examples:
        """Some of the examples, in the order of `indices`."""
        return Examples(
            self.items, self.users[indices], self.starts[indices], self.targets_at[indices]
        )


@dataclass(frozen=True)
class Split:
    """What a model may learn from, and what it is evaluated on.

    Attributes:
      items: all interactions, which the others are ranges of.
      train: item sequences, oldest first.
      validation, test: at most one example per user.
    """

    items: np.ndarray
    train: Ranges
    validation: Examples
    test: Examples

    def followed(self, examples: Examples) -> np.ndarray:
        """Whether some training sequence has an example's target right after the last item of its
        history: bool [examples].
        """
        size = int(self.items.max()) + 1
        here = self.followed_at()
        known = np.unique(self.items[here] * size + self.items[here + 1])
        last = self.items[np.maximum(examples.targets_at - 1, 0)]
        has_history = examples.targets_at > examples.starts
        return has_history & np.isin(last * size + examples.targets, known)

    def followed_at(self) -> np.ndarray:
        """Indices of the training's items that another one follows, int64 [any]."""
        here = self.train.indices()
        return here[here + 1 < np.repeat(self.train.stops, self.train.lengths)]

    def item_counts(self, size: int) -> np.ndarray:
        """Occurrences in the training sequences of every item of a catalogue, int64 [size]."""
        return np.bincount(self.items[self.train.indices()], minlength=size)


def split_dataset(dataset: Dataset, kind: str, holdout: float) -> Split:
    """Splits a dataset.

    Args:
      kind: `leave_two_out`: per user, the last item is the test target, the last but one the
          validation target, all before them is training (users with fewer than three items are
          training only). `time`: training ends at the (1 - 2 * holdout) quantile of all
          timestamps, validation at the (1 - holdout) quantile; a user's example is the first
          item of the period, given everything before it. `users`: disjoint users, by a digest
          of the user id; a held-out user's target is the last item. `users_random`: the same, the
        target at a random position. `users_and_time`, the paper's: disjoint users, and training
        ends at the (1 - holdout) quantile of all timestamps; a held-out user's target is a random
        one of the items from then on.
      holdout: share of interactions (`time`), of users (`users`, `users_random`), or of both, in
        each held-out part.
    """
    cuts = cut_times(dataset.histories, kind, holdout)
    split = split_histories(dataset.histories, kind, holdout, cuts)
    for name in ("train", "validation", "test"):
        check_some(len(getattr(split, name)), name, dataset.name, kind)
    return split


def check_some(count: int, name: str, dataset: str, kind: str) -> None:
    """Raises UserError where a split leaves nothing."""
    if not count:
        need = "three items" if kind == "leave_two_out" else "enough items and users"
        raise UserError(
            f"dataset {dataset}: data.split={kind} leaves {name} empty; it needs users with {need}"
        )


def cut_times(histories: HistorySource, kind: str, holdout: float) -> np.ndarray:
    """What a kind of split needs of all users: times at which training and validation end."""
    shares = {"time": [1 - 2 * holdout, 1 - holdout], "users_and_time": [1 - holdout]}
    if kind not in shares:
        return np.zeros(0)
    times = histories.timestamps
    if times is None:
        raise UserError(f"data.split={kind} needs a 'timestamps' column in histories.parquet")
    return np.quantile(times, shares[kind])


def split_histories(histories: Histories, kind: str, holdout: float, cuts: np.ndarray) -> Split:
    """Splits the histories of some users, as those of all are split; `cuts` are `cut_times`."""
    return {
        "leave_two_out": _leave_two_out,
        "time": _by_time,
        "users": _by_users,
        "users_random": _by_users_at_random,
        "users_and_time": _by_users_and_time,
    }[kind](histories, holdout, cuts)


def _leave_two_out(histories: Histories, holdout: float, cuts: np.ndarray) -> Split:
    del holdout, cuts
    starts, stops = histories.offsets[:-1], histories.offsets[1:]
    enough = stops - starts >= 3
    return Split(
        histories.items,
        Ranges(starts, stops - 2 * enough),
        _examples(histories, enough, stops - 2),
        _examples(histories, enough, stops - 1),
    )


def _first_from(histories: Histories, cut: float) -> np.ndarray:
    """Where each user's first interaction at or after a time is; where the user's end, if none."""
    earlier = np.concatenate([[0], np.cumsum(histories.timestamps < cut)])
    starts, stops = histories.offsets[:-1], histories.offsets[1:]
    return starts + earlier[stops] - earlier[starts]


def _by_time(histories: Histories, holdout: float, cuts: np.ndarray) -> Split:
    del holdout
    starts, stops = histories.offsets[:-1], histories.offsets[1:]
    first_cut, second_cut = cuts
    begin, middle = _first_from(histories, first_cut), _first_from(histories, second_cut)
    known = begin > starts
    return Split(
        histories.items,
        Ranges(starts[known], begin[known]),
        _examples(histories, known & (begin < middle), begin),
        _examples(histories, (middle > starts) & (middle < stops), middle),
    )


def _by_users(histories: Histories, holdout: float, cuts: np.ndarray) -> Split:
    del cuts
    stops = histories.offsets[1:]
    place, _ = _digests(histories)
    return _disjoint(histories, holdout, place, stops, stops - 1)


def _by_users_at_random(histories: Histories, holdout: float, cuts: np.ndarray) -> Split:
    del cuts
    starts, stops = histories.offsets[:-1], histories.offsets[1:]
    place, random = _digests(histories)
    targets_at = starts + 1 + (random * (stops - starts - 1)).astype(np.int64)
    return _disjoint(histories, holdout, place, stops, targets_at)


def _by_users_and_time(histories: Histories, holdout: float, cuts: np.ndarray) -> Split:
    starts, stops = histories.offsets[:-1], histories.offsets[1:]
    (cut,) = cuts
    begin = _first_from(histories, cut)
    place, random = _digests(histories)
    first = np.maximum(begin, starts + 1)
    targets_at = first + (random * np.maximum(stops - first, 0)).astype(np.int64)
    return _disjoint(histories, holdout, place, begin, targets_at)


def _disjoint(
    histories: Histories,
    holdout: float,
    place: np.ndarray,
    train_until: np.ndarray,
    targets_at: np.ndarray,
) -> Split:
    """Users by place: below `holdout` validation, below twice that test, the others training."""
    starts, stops = histories.offsets[:-1], histories.offsets[1:]
    train = (place >= 2 * holdout) & (train_until > starts)
    held_out = (place < 2 * holdout) & (targets_at > starts) & (targets_at < stops)
    return Split(
        histories.items,
        Ranges(starts[train], train_until[train]),
        _examples(histories, held_out & (place < holdout), targets_at),
        _examples(histories, held_out & (place >= holdout), targets_at),
    )


def _digests(histories: Histories) -> tuple[np.ndarray, np.ndarray]:
    """Two numbers in 0..1 for each user, by the user's id alone."""
    digests = b"".join(hashlib.sha256(user.encode()).digest()[:16] for user in histories.user_ids)
    numbers = np.frombuffer(digests, ">u8").reshape(-1, 2) / 2.0**64
    return numbers[:, 0], np.minimum(numbers[:, 1], np.nextafter(1.0, 0.0))


def _examples(histories: Histories, chosen: np.ndarray, targets_at: np.ndarray) -> Examples:
    """One example for each chosen user, whose history is all before the target."""
    users = np.flatnonzero(chosen)
    return Examples(histories.items, users, histories.offsets[users], targets_at[users])
