"""Splits of user histories into training sequences and held-out next-item examples."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np

from prefixmem_jax.data.formats.parquet import Dataset, Histories
from prefixmem_jax.errors import UserError


@dataclass(frozen=True)
class Example:
    """Predict `target` from the history before it, oldest item first."""

    user: int
    history: np.ndarray
    target: int


@dataclass(frozen=True)
class Split:
    """What a model may learn from, and what it is evaluated on.

    Attributes:
      train: item sequences, oldest first.
      validation, test: at most one example per user.
    """

    train: list[np.ndarray]
    validation: list[Example]
    test: list[Example]

    def item_counts(self, items: int) -> np.ndarray:
        """Occurrences of every item in the training sequences, int64 [items]."""
        return np.bincount(np.concatenate(self.train), minlength=items)


def split_dataset(dataset: Dataset, kind: str, holdout: float) -> Split:
    """Splits a dataset.

    Args:
      kind: `leave_two_out`: per user, the last item is the test target, the last but one the
          validation target, all before them is training (users with fewer than three items are
          training only). `time`: training ends at the (1 - 2 * holdout) quantile of all
          timestamps, validation at the (1 - holdout) quantile; a user's example is the first
          item of the period, given everything before it. `users`: disjoint users, by a digest
          of the user id; a held-out user's target is the last item.
      holdout: share of interactions (`time`) or users (`users`) in each held-out part.
    """
    split = {"leave_two_out": _leave_two_out, "time": _by_time, "users": _by_users}[kind](
        dataset.histories, holdout
    )
    for name in ("train", "validation", "test"):
        if not getattr(split, name):
            need = "three items" if kind == "leave_two_out" else "enough items and users"
            raise UserError(
                f"dataset {dataset.name}: data.split={kind} leaves {name} empty; it needs users "
                f"with {need}"
            )
    return split


def _leave_two_out(histories: Histories, holdout: float) -> Split:
    del holdout
    train, validation, test = [], [], []
    for user in range(len(histories)):
        items = histories.of(user)
        if len(items) < 3:
            train.append(items)
            continue
        train.append(items[:-2])
        validation.append(Example(user, items[:-2], int(items[-2])))
        test.append(Example(user, items[:-1], int(items[-1])))
    return Split(train, validation, test)


def _by_time(histories: Histories, holdout: float) -> Split:
    if histories.timestamps is None:
        raise UserError("data.split=time needs a 'timestamps' column in histories.parquet")
    first_cut, second_cut = np.quantile(histories.timestamps, [1 - 2 * holdout, 1 - holdout])
    train, validation, test = [], [], []
    for user in range(len(histories)):
        items = histories.of(user)
        times = histories.timestamps[histories.offsets[user] : histories.offsets[user + 1]]
        begin, middle = np.searchsorted(times, [first_cut, second_cut])
        if begin > 0:
            train.append(items[:begin])
        if 0 < begin < middle:
            validation.append(Example(user, items[:begin], int(items[begin])))
        if 0 < middle < len(items):
            test.append(Example(user, items[:middle], int(items[middle])))
    return Split(train, validation, test)


def _by_users(histories: Histories, holdout: float) -> Split:
    train, validation, test = [], [], []
    for user in range(len(histories)):
        items = histories.of(user)
        digest = hashlib.sha256(histories.user_ids[user].encode()).digest()
        place = int.from_bytes(digest[:8], "big") / 2**64
        if place >= 2 * holdout:
            train.append(items)
        elif len(items) > 1:
            part = validation if place < holdout else test
            part.append(Example(user, items[:-1], int(items[-1])))
    return Split(train, validation, test)
