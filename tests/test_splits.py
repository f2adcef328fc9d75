"""Splits: who trains, who is held out, and what each held-out user is asked."""

import dataclasses

import numpy as np
import pytest

from prefixmem_jax.data.dataset import Dataset, Histories
from prefixmem_jax.data.splits import Examples, split_dataset
from prefixmem_jax.errors import UserError
from prefixmem_jax.semantic_ids.catalog import Catalog
from prefixmem_jax.semantic_ids.space import SidSpace


def tiny_dataset(sequences, timestamps=None):
    sids = np.arange(40).reshape(20, 2)
    catalog = Catalog(sids % 8, [None] * 20, SidSpace((8, 8)))
    offsets = np.cumsum([0] + [len(s) for s in sequences])
    times = None if timestamps is None else np.concatenate(timestamps)
    histories = Histories(
        np.concatenate(sequences), offsets, [f"u{i}" for i in range(len(sequences))], times
    )
    return Dataset("tiny", catalog, histories, "")


def timed_dataset(users):
    """Ten random items of each at random times, which come along."""
    rng = np.random.default_rng(0)
    sequences = [rng.integers(0, 20, 10) for _ in range(users)]
    times = [np.sort(rng.integers(0, 10_000, 10)) for _ in range(users)]
    return tiny_dataset(sequences, times), sequences, times


def spelled(examples):
    return list(
        zip(
            examples.users.tolist(),
            [history.tolist() for history in examples.histories()],
            examples.targets.tolist(),
            strict=True,
        )
    )


def test_leave_two_out():
    split = split_dataset(tiny_dataset([[1, 2, 3, 4], [5, 6], [7, 8, 9]]), "leave_two_out", 0.1)
    train = zip(split.train.starts, split.train.stops, strict=True)
    assert [split.items[start:stop].tolist() for start, stop in train] == [[1, 2], [5, 6], [7]]
    assert spelled(split.validation) == [(0, [1, 2], 3), (2, [7], 8)]
    assert spelled(split.test) == [(0, [1, 2, 3], 4), (2, [7, 8], 9)]
    assert spelled(split.test.take(np.array([1]))) == spelled(split.test)[1:]
    assert split.item_counts(20).tolist() == [0, 1, 1, 0, 0, 1, 1, 1] + [0] * 12


def test_what_followed_in_training():
    sequences = [[4, 1, 2, 3, 0], [1, 2, 1], [1, 2, 0, 3], [6, 9]]
    split = split_dataset(tiny_dataset(sequences), "leave_two_out", 0.1)
    # Trained on 4 1 2, on 1, on 1 2 and on 6 9: of 2-3, 1-2, 2-0 one is there, of 3-0, 2-1, 0-3 none;
    # nor is 2-1, where one sequence ends and the next one begins.
    assert split.followed(split.validation).tolist() == [False, True, False]
    assert split.followed(split.test).tolist() == [False] * 3
    asked = Examples(split.items, np.arange(2), np.array([0, 10]), np.array([0, 13]))
    assert split.followed(asked).tolist() == [False, True]  # without a history; 6-9


def test_time_split_never_trains_on_the_held_out_period():
    dataset, sequences, times = timed_dataset(50)
    split = split_dataset(dataset, "time", 0.1)
    first, second = np.quantile(np.concatenate(times), [0.8, 0.9])
    assert split.train.lengths.sum() == sum(int((t < first).sum()) for t in times)
    for examples, begin, end in (
        (split.validation, first, second),
        (split.test, second, np.inf),
    ):
        assert len(examples) > 10
        for user, history, target in spelled(examples):
            at = len(history)
            assert begin <= times[user][at] < end
            assert sequences[user][:at].tolist() == history
            assert sequences[user][at] == target
            assert (times[user][:at] < begin).all()
    with pytest.raises(UserError, match="timestamps"):
        split_dataset(tiny_dataset(sequences), "time", 0.1)


def test_user_split_is_disjoint_and_depends_on_ids_alone():
    sequences = [np.array([i % 20, (i + 1) % 20, (i + 2) % 20]) for i in range(400)]
    dataset = tiny_dataset(sequences)
    split = split_dataset(dataset, "users", 0.1)
    for user, history, target in spelled(split.validation) + spelled(split.test):
        assert [*history, target] == sequences[user].tolist()
    validation, test = set(split.validation.users.tolist()), set(split.test.users.tolist())
    assert not validation & test
    assert len(validation) + len(test) + len(split.train) == 400
    assert 20 < len(split.validation) < 65 and 20 < len(split.test) < 65
    reversed_histories = dataclasses.replace(
        dataset.histories, user_ids=dataset.histories.user_ids[::-1]
    )
    again = split_dataset(dataclasses.replace(dataset, histories=reversed_histories), "users", 0.1)
    assert set((399 - again.test.users).tolist()) == test


def test_users_with_a_target_at_random_are_those_of_users():
    rng = np.random.default_rng(0)
    sequences = [np.arange(rng.integers(1, 30)) for _ in range(2000)]
    dataset = tiny_dataset(sequences)
    last, split = (split_dataset(dataset, kind, 0.2) for kind in ("users", "users_random"))
    for name in ("train", "validation", "test"):
        assert len(getattr(last, name)) == len(getattr(split, name)) > 100
    where = []
    for user, history, target in spelled(split.validation) + spelled(split.test):
        assert history == list(range(target)) and 1 <= target < len(sequences[user])
        if len(sequences[user]) > 2:
            where.append((target - 1) / (len(sequences[user]) - 2))
    assert 0.45 < np.mean(where) < 0.55 and min(where) == 0 and max(where) == 1


def test_the_papers_split_is_disjoint_in_users_and_in_time():
    dataset, sequences, times = timed_dataset(1000)
    split = split_dataset(dataset, "users_and_time", 0.2)
    users = split_dataset(dataset, "users", 0.2)
    cut = np.quantile(np.concatenate(times), 0.8)
    held_out = set(users.validation.users.tolist()) | set(users.test.users.tolist())
    expected = sum(int((t < cut).sum()) for u, t in enumerate(times) if u not in held_out)
    assert split.train.lengths.sum() == expected > 1000
    assert set(split.validation.users.tolist()) <= set(users.validation.users.tolist())
    assert set(split.test.users.tolist()) <= set(users.test.users.tolist())
    later = []
    for user, history, target in spelled(split.validation) + spelled(split.test):
        at = len(history)
        assert sequences[user][:at].tolist() == history and sequences[user][at] == target
        assert times[user][at] >= cut and at >= 1
        later.append(times[user][at - 1] >= cut)
    assert 0.2 < np.mean(later) < 0.8  # not always the first of them
    with pytest.raises(UserError, match="users_and_time needs a 'timestamps' column"):
        split_dataset(tiny_dataset(sequences), "users_and_time", 0.1)
