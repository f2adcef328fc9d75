"""What followed what: counted by hand, and mixed into every search as a user would expect."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models import make_model, make_run, prompts, small_config
from scipy import sparse
from test_beam_search import brute_force

from prefixmem_jax.config_groups import DecoderConfig, EvaluationConfig
from prefixmem_jax.convert import export_run
from prefixmem_jax.data.dataset import Histories
from prefixmem_jax.data.prepare import prepare_data
from prefixmem_jax.data.similar_items import similar_items, words_of_items
from prefixmem_jax.data.splits import split_dataset
from prefixmem_jax.data.transitions import (
    FARTHEST,
    Transitions,
    following_counts,
    return_rate,
)
from prefixmem_jax.errors import UserError
from prefixmem_jax.evaluation.heuristics import (
    ALIKE,
    BACKS,
    SMOOTHINGS,
    WAYS,
    transition_heuristic,
    tuned_transitions,
)
from prefixmem_jax.inference.beam_search import beam_search
from prefixmem_jax.inference.cached_sid_lm import CachedSidLM
from prefixmem_jax.inference.engine import last_items
from prefixmem_jax.inference.item_prior import NEVER, Returning
from prefixmem_jax.inference.transition_prior import TransitionTable, transition_prior
from prefixmem_jax.recommender import recommend
from prefixmem_jax.runs.run import TRANSITIONS, Run
from prefixmem_jax.training.loop import train

CONFIG = small_config(
    DecoderConfig(layers=1), 0, evaluation=EvaluationConfig(batch_size=16, transition_share=0.4)
)


@pytest.fixture(scope="module")
def data():
    return prepare_data(CONFIG.data)


def test_they_are_counted_within_training_sequences_only(data):
    train, by_fade = data.split.train, {}
    for fade in (0.85, 1.0):
        counts = by_fade[fade] = np.zeros((150, 150))
        for start, stop in zip(train.starts, train.stops, strict=True):
            own = data.split.items[start:stop]
            for at, item in enumerate(own):
                for away, later in enumerate(own[at + 1 : at + 1 + FARTHEST]):
                    counts[item, later] += fade**away
        found = following_counts(data.split, 150, fade).toarray()
        np.testing.assert_allclose(found, counts)
    assert train.lengths.max() > FARTHEST + 1
    assert (by_fade[1.0] > by_fade[0.85]).any()
    tuned = tuned_transitions(data, True)
    near = tuned.near.toarray().astype(np.float64)
    alike = similar_items(words_of_items(data.catalog), ALIKE).toarray()
    tried = []
    for (fade, own, other), back, more in itertools.product(WAYS, BACKS, SMOOTHINGS):
        both = by_fade[fade] + back * by_fade[fade].T
        of_own, of_other = (
            np.maximum(both.sum(axis=axis, keepdims=True) + more, 1e-12) for axis in (1, 0)
        )
        tried.append((both + more * alike) / of_own**own / of_other**other)
    assert sum(np.allclose(near, one) for one in tried) == 1
    history = data.split.test.history(3)
    expected = sum(
        tuned.decay**since * near[item] for since, item in enumerate(history[::-1].tolist())
    )
    np.testing.assert_allclose(tuned.scores(history), expected)
    scored = transition_heuristic(data, tuned)(history)
    np.testing.assert_allclose(scored, expected, atol=1e-8)


def test_the_most_frequent_are_kept_and_files_are_checked(tmp_path):
    near = sparse.csr_array(np.array([[0, 2, 5, 2], [0, 0, 0, 0], [1, 0, 0, 3], [0, 0, 7, 0]]))
    neighbours, counts = Transitions(near, 0.5, 0.25).most_frequent(2)
    assert neighbours.tolist() == [[2, 1], [-1, -1], [3, 0], [2, -1]]
    assert counts.tolist() == [[5, 2], [0, 0], [3, 1], [7, 0]]
    path = tmp_path / TRANSITIONS
    Transitions(near, 0.5, 0.25).save(path)
    again = Transitions.load(path)
    assert (again.decay, again.returns) == (0.5, 0.25)
    assert (again.near.toarray() == near.toarray()).all()
    whole = path.read_bytes()
    for content in (b"", whole[:50], b"junk"):
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"transitions\.npz: not the transitions of a run"):
            Transitions.load(path)


def test_how_often_histories_come_back_to_an_item(data):
    """Once in five later items here, whichever came first; the sequences of two users are one item."""
    histories = [[1, 2, 1, 3, 9, 9], [4, 5, 6, 9, 9], [7, 9, 9], [7, 9, 9]]
    offsets = np.cumsum([0, *map(len, histories)])
    made = Histories(np.concatenate(histories), offsets, ["a", "b", "c", "d"])
    split = split_dataset(dataclasses.replace(data.dataset, histories=made), "leave_two_out", 0.1)
    assert split.train.lengths.tolist() == [4, 3, 1, 1]
    assert return_rate(split) == 1 / 5


@functools.cache
def scored_users() -> tuple:
    """A model, three users' histories, what the counts say, and every SID's score by the codes."""
    model, rows_at, catalog, rng = make_model((3, 4, 5), 40, True, seed=1)
    near = rng.integers(0, 3, (40, 40)) * (rng.random((40, 40)) < 0.1)
    near[[30, 31]] = 0
    near[17, 5] = 2  # which the first user has had
    histories = [[3, 17, 5], [8], [30, 31]]
    by_codes = brute_force(model, rows_at, catalog, histories, catalog.group_sids)
    return model, rows_at, catalog, near, histories, by_codes


@pytest.mark.parametrize("share, returns", [(0.3, 0.0), (1.0, 0.0), (0.3, NEVER), (0.6, 0.4)])
def test_a_wide_search_ranks_by_the_mixed_probability(share, returns):
    """Against scoring every SID by itself; the third user's items were never followed.

    What was had is left out, or comes as often as users come back.
    """
    model, rows_at, catalog, near, histories, by_codes = scored_users()
    transitions = Transitions(sparse.csr_array(near.astype(float)), 0.6, returns)
    seen = np.array([[catalog.group_of_item[5], -1], [-1, -1], [-1, -1]])
    rates = transitions.decay, transitions.returns
    table = TransitionTable(*transitions.most_frequent(64), *rates)
    trie = jax.tree.map(jnp.asarray, catalog.trie.levels)
    groups = jnp.asarray(catalog.group_of_item)
    batch, size = prompts(model, catalog, histories, 4), len(catalog.group_sids)

    @jax.jit
    def search(table, recent, seen):
        returning = Returning(seen, table.returns)
        prior = transition_prior(table, recent, returning, groups, trie, share)
        cached = CachedSidLM(model, rows_at)
        return beam_search(cached, batch, size, trie, returning, transitions=prior)

    found = search(table, last_items(histories, 4), seen)
    for user, history in enumerate(histories):
        said = np.bincount(
            catalog.group_of_item, transitions.scores(np.array(history)), minlength=size
        )
        had = sorted(set(seen[user]) - {-1})
        gone = had if returns == 0 else []
        weight = share if said.any() else 0.0
        said = said / max(said.sum(), 1e-9)
        if said[had].sum() > 0:
            new = np.delete(np.arange(size), had)
            said[new] *= (1 - returns) / said[new].sum()
            said[had] *= returns / said[had].sum()
        with np.errstate(divide="ignore"):
            expected = {
                tuple(sid): np.log(
                    (1 - weight) * np.exp(by_codes[user, group]) + weight * said[group]
                )
                for group, sid in enumerate(catalog.group_sids.tolist())
                if group not in gone
            }
        expected = {sid: value for sid, value in expected.items() if np.isfinite(value)}
        scores = np.asarray(found.scores[user])
        names = [tuple(sid) for sid in np.asarray(found.codes[user])[np.isfinite(scores)].tolist()]
        assert set(names) == set(expected)
        np.testing.assert_allclose(
            scores[np.isfinite(scores)], [expected[name] for name in names], rtol=1e-4, atol=1e-4
        )
        assert (np.diff(scores[np.isfinite(scores)]) <= 0).all()


def test_any_number_of_devices_finds_the_same(data, tmp_path):
    run = make_run(tmp_path / "run", CONFIG)
    tuned_transitions(data, True).save(run.path / TRANSITIONS)
    histories = data.split.test.take(np.arange(11)).histories()
    one, eight = (
        run.engine(data.catalog, jax.devices()[:count]).search(
            histories, 9, True, exclude_seen=True
        )
        for count in (1, 8)
    )
    np.testing.assert_array_equal(one[0], eight[0])
    np.testing.assert_allclose(one[1], eight[1], rtol=1e-5)
    without, _ = run.engine(data.catalog, jax.devices()[:1]).search(
        histories, 9, True, exclude_seen=True, options=EvaluationConfig()
    )
    assert (without != one[0]).any()


def test_training_counts_them_and_a_run_without_says_so(data, tmp_path):
    config = dataclasses.replace(
        CONFIG, steps=2, data=dataclasses.replace(CONFIG.data, batch_size=8)
    )
    # What a run that was stopped before its first checkpoint had counted is of no matter.
    (tmp_path / "run").mkdir()
    near = sparse.eye_array(len(data.catalog), format="csr")
    Transitions(near, 0.5, 0.0).save(tmp_path / "run" / TRANSITIONS)
    train(config, tmp_path / "run")
    assert (Run(tmp_path / "run").transitions.near != tuned_transitions(data, True).near).nnz == 0
    (tmp_path / "run" / TRANSITIONS).unlink()
    run = Run(tmp_path / "run")
    with pytest.raises(UserError, match=r"has no transitions\.npz"):
        recommend(run.engine(data.catalog), "3,4", 3)
    with pytest.raises(UserError, match=r"has no transitions\.npz"):
        export_run(run, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    train(config, tmp_path / "run")  # finished as it is, it only counts
    assert Run(run.path).transitions is not None
