"""From vectors to SIDs: clusters, residuals, collisions, and what is measured of them."""

import collections
import dataclasses
import itertools

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prefixmem_jax.parallel.mesh import make_mesh
from prefixmem_jax.semantic_ids import collisions
from prefixmem_jax.semantic_ids.clustering import assign, plus_plus, revive
from prefixmem_jax.semantic_ids.collisions import add_level, move_to_free
from prefixmem_jax.semantic_ids.quality import measure, target_levels, verdicts_on
from prefixmem_jax.semantic_ids.quantizers.quantizer import Fitting
from prefixmem_jax.semantic_ids.quantizers.residual_kmeans import ResidualKMeans
from prefixmem_jax.semantic_ids.vectors import Vectors


def blobs(count, clusters, width=6, seed=0):
    """Vectors around far apart centres, and the centre of each."""
    rng = np.random.default_rng(seed)
    centres = 200 * rng.standard_normal((clusters, width))
    of = np.arange(count) % clusters
    return (centres[of] + rng.standard_normal((count, width))).astype(np.float32), of


@pytest.fixture(scope="module")
def mesh():
    return make_mesh(devices=jax.devices()[:1])


def squared(vectors, centroids):
    return ((vectors[:, None] - centroids[None]) ** 2).sum(axis=-1)


@pytest.mark.parametrize("devices", [1, 8])
@pytest.mark.parametrize("count, clusters", [(1, 1), (37, 5), (3000, 700)])
def test_assignment_by_brute_force(devices, count, clusters):
    rng = np.random.default_rng(1)
    vectors = rng.standard_normal((count, 4)).astype(np.float32)
    centroids = rng.standard_normal((clusters, 4)).astype(np.float32)
    found = assign(vectors, centroids, make_mesh(devices=jax.devices()[:devices]))
    distances = squared(vectors, centroids)
    np.testing.assert_array_equal(found.codes, distances.argmin(axis=1))
    np.testing.assert_allclose(found.error, distances.min(axis=1).sum(), rtol=1e-4)
    np.testing.assert_array_equal(found.counts, np.bincount(found.codes, minlength=clusters))
    sums = np.zeros((clusters, 4))
    np.add.at(sums, found.codes, vectors)
    np.testing.assert_allclose(found.sums, sums, rtol=1e-4, atol=1e-4)


def test_plus_plus_starts_in_every_cluster():
    vectors, of = blobs(600, 12)
    for seed in range(5):
        picked = plus_plus(vectors, 12, seed)
        assert set(squared(picked, vectors).argmin(axis=1) % 12) == set(of)
    same = np.ones((9, 3), np.float32)  # nothing is far from anything
    np.testing.assert_array_equal(plus_plus(same, 9, 0), same)


def test_clusters_that_nobody_is_in_come_back():
    centroids = np.array([[0.0, 1.0], [5.0, 5.0], [9.0, 9.0]], np.float32)
    revived = np.asarray(revive(centroids, np.array([8, 0, 1]), jax.random.key(0)))
    assert np.abs(revived[:2] - centroids[0]).max() < 0.1 and len(np.unique(revived, axis=0)) == 3
    np.testing.assert_array_equal(revived[2], centroids[2])


@pytest.mark.parametrize("init", ["k-means++", "sample"])
@pytest.mark.parametrize("update", ["pass", "piece"])
def test_each_level_takes_off_what_it_can(mesh, init, update):
    vectors, of = blobs(900, 8)
    config = ResidualKMeans(codes=(8, 8, 16), init=init, update=update)
    fitted = config.fit(Vectors(vectors, None, "x"), Fitting(mesh))
    codes = config.encode(fitted, vectors, mesh)
    if init == "k-means++":  # the clusters themselves
        pairs = set(zip(codes[:, 0].tolist(), of.tolist(), strict=True))
        assert len(pairs) == 8
    errors = [
        ((vectors - config.decode(fitted, codes[:, :level])) ** 2).sum() for level in (1, 2, 3)
    ]
    assert errors[0] > 1.1 * errors[1] > 1.2 * errors[2]
    # Greedy: each code is the nearest to what is left over.
    for level in range(3):
        left = vectors - (config.decode(fitted, codes[:, :level]) if level else 0)
        best = squared(left, fitted[f"level_{level + 1}"]).min(axis=1)
        own = squared(left, fitted[f"level_{level + 1}"])[np.arange(900), codes[:, level]]
        np.testing.assert_allclose(own, best, rtol=1e-3, atol=1e-3)
    last = config.last_distances(fitted, vectors, codes)
    np.testing.assert_allclose(last, squared(left, fitted["level_3"]), rtol=1e-3, atol=1e-2)


def test_balanced_codes_have_more_alike_many_vectors(mesh):
    """Also for vectors that codes were not fitted to."""
    rng = np.random.default_rng(0)
    dense, sparse = rng.normal(0, 0.1, (3000, 6)), rng.normal(0, 2.0, (1000, 6))
    vectors = rng.permutation(np.concatenate([dense, sparse])).astype(np.float32)
    fitted_to, others = Vectors(vectors[:3000], None, "x"), vectors[3000:]
    largest, errors = [], []
    for balance in (0.0, 0.5):
        config = ResidualKMeans(codes=(16, 16), balance=balance)
        fitted = config.fit(fitted_to, Fitting(mesh))
        codes = config.encode(fitted, others, mesh)
        largest.append([np.bincount(codes[:, level]).max() / 1000 * 16 for level in range(2)])
        errors.append(((others - config.decode(fitted, codes)) ** 2).mean() / others.var())
    # The largest code of each level, in shares of an even spread.
    assert all(after < 0.5 * before for before, after in zip(*largest, strict=True)), largest
    assert errors[0] < errors[1] < 1.3 * errors[0], errors  # it has its price


@pytest.mark.parametrize("balance", [0.0, 0.5])
def test_a_killed_fit_goes_on_bit_identical(mesh, balance):
    vectors = Vectors(blobs(400, 10)[0], None, "x")
    config = ResidualKMeans(codes=(6, 6), iterations=4, balance=balance)
    states = []
    whole = config.fit(vectors, Fitting(mesh, save=lambda state: states.append(dict(state))))
    assert len(states) == 8
    for state in states:
        again = config.fit(vectors, Fitting(mesh, state))
        assert again.keys() == whole.keys()
        for name in whole:
            np.testing.assert_array_equal(again[name], whole[name])


def test_codes_do_not_depend_on_pieces_or_order_in_the_file(mesh, monkeypatch):
    vectors, _ = blobs(500, 10)
    config = ResidualKMeans(codes=(6, 6), iterations=4, points=0)
    whole = config.fit(Vectors(vectors, None, "x"), Fitting(mesh))
    monkeypatch.setattr("prefixmem_jax.semantic_ids.vectors.PIECE", 64 * vectors.shape[1])
    monkeypatch.setattr("prefixmem_jax.semantic_ids.quantizers.residual_kmeans.KEPT", 0)
    order = np.random.default_rng(0).permutation(500)
    shuffled = Vectors(vectors[order], np.argsort(order), "x")
    pieces = config.fit(shuffled, Fitting(mesh))
    for name in whole:
        np.testing.assert_allclose(pieces[name], whole[name], rtol=1e-4, atol=1e-4)


def items_by_sid(sids):
    groups = collections.defaultdict(list)
    for item, sid in enumerate(map(tuple, sids.tolist())):
        groups[sid].append(item)
    return groups


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 60), st.integers(1, 4), st.integers(1, 5), st.integers(0, 100))
def test_colliding_items_move_to_free_codes(items, prefixes, codes, seed):
    rng = np.random.default_rng(seed)
    sids = np.column_stack([rng.integers(0, prefixes, items), rng.integers(0, codes, items)])
    distances = rng.random((items, codes)).astype(np.float32)
    moved = move_to_free(sids, codes, lambda some: distances[some])
    with pytest.MonkeyPatch.context() as patch:  # a few prefixes at a time
        patch.setattr(collisions, "TABLE_BYTES", 2 * codes)
        pieces = move_to_free(sids, codes, lambda some: distances[some])
    np.testing.assert_array_equal(pieces, moved)
    np.testing.assert_array_equal(moved[:, 0], sids[:, 0])
    for prefix in range(prefixes):
        inside = sids[:, 0] == prefix
        assert len(np.unique(moved[inside, 1])) == min(inside.sum(), codes)
    for sid, group in items_by_sid(sids).items():
        nearest = min(group, key=lambda item: (distances[item, sid[-1]], item))
        assert tuple(moved[nearest]) == sid
        if len(group) == 1:
            assert tuple(moved[group[0]]) == sid


def test_the_nearest_free_code_is_taken():
    sids = np.zeros((3, 2), np.int64)
    distances = np.array([[0, 3, 9, 4], [1, 2, 9, 8], [2, 1, 9, 5]], np.float32)
    moved = move_to_free(sids, 4, lambda some: distances[some])
    # 0 stays; 2 is nearer to code 1 than item 1 is, whose next best is 3.
    assert moved[:, 1].tolist() == [0, 3, 1]


def test_one_more_level_counts_those_that_share():
    sids = np.array([[1, 2], [0, 0], [1, 2], [1, 2], [0, 1]])
    assert add_level(sids).tolist() == [[1, 2, 0], [0, 0, 0], [1, 2, 1], [1, 2, 2], [0, 1, 0]]


def bits(*shares):
    return -sum(share * np.log2(share) for share in shares)


def test_measures_by_hand():
    sids = np.array([[0, 0], [0, 1], [1, 0], [1, 0]])
    # Interactions: item 1 three times, the others once each.
    measured = measure(
        sids, (4, 2), np.array([0, 1, 1, 1, 2, 3]), held_out=np.array([0, 1, 1, 2, 3])
    )
    assert measured | {"levels": None} == {
        "items": 4, "distinct": 3, "sharing": 2, "largest_group": 2, "levels": None,
    }  # fmt: skip
    first, second = measured["levels"]
    assert first["used"] == 2 and first["dead"] == 2 and first["prefixes"] == 2
    assert first["entropy"] == pytest.approx(1.0) and first["perplexity"] == pytest.approx(2.0)
    assert second["entropy"] == pytest.approx(bits(0.75, 0.25))
    assert second["conditional_entropy"] == pytest.approx(0.5)  # 1 bit after 0, none after 1
    assert second["prefixes_before"] == 2 and second["prefixes"] == 3
    assert first["next_item_bits"] == pytest.approx(bits(4 / 6, 2 / 6))
    assert second["next_item_bits"] == pytest.approx(4 / 6 * bits(1 / 4, 3 / 4))
    assert first["counting_accuracy"] == pytest.approx(3 / 5)  # always code 0
    assert second["counting_accuracy"] == pytest.approx(4 / 5)  # 0 -> 1, 1 -> 0
    often = np.repeat([0, 1, 2, 3], [6, 4, 5, 4])
    # After first code 0, six and four times: each likely code 10 / 2^0.97 = 5.1 times, of one turn;
    # after 1 the only one 9 times.
    found = [
        measure(sids, (4, 2), often, held_out=np.array([0, 1, 1, 2, 3]), turns=turns)
        for turns in (1, 2.5)
    ]
    often_enough = [[one["met_often_enough"] for one in measured["levels"]] for measured in found]
    assert often_enough == [[1, 1], [0, pytest.approx(3 / 5)]]
    assert any("level 2: 60% of next items" in one.words for one in verdicts_on(found[1]))


def test_neighbours_share_the_prefixes_that_were_made_of_them(mesh):
    vectors, _ = blobs(400, 4)
    source = Vectors(vectors, None, "x")
    config = ResidualKMeans(codes=(4, 8))
    fitted = config.fit(source, Fitting(mesh))
    sids = config.encode(fitted, vectors, mesh)
    measured = measure(
        sids, (4, 8), vectors=source, decode=lambda some: config.decode(fitted, some)
    )
    first, second = measured["levels"]
    assert first["neighbour_purity"] == 1.0
    assert first["neighbour_purity_by_chance"] == pytest.approx(0.25)
    assert second["neighbour_purity"] < 1
    assert 0 < second["reconstruction_error"] < first["reconstruction_error"] < 0.1
    at_random = np.random.default_rng(0).permutation(sids)
    again = measure(at_random, (4, 8), vectors=source)["levels"][0]
    assert abs(again["neighbour_purity"] - 0.25) < 0.03


def test_verdicts_say_what_to_look_at():
    every = np.array(list(itertools.product(range(4), range(4), range(4))))
    even = measure(every, (4, 4, 4))
    assert all(one.good for one in verdicts_on(even)) and target_levels(even) == (3,)
    dead = verdicts_on(measure(every, (4, 8, 4)))
    assert [one.words.partition(":")[0] for one in dead if not one.good] == ["level 2"]
    shared = verdicts_on(measure(np.concatenate([every, every[:9]]), (4, 4, 4)))
    assert any("18 items (24.7%) share a SID" in one.words for one in shared if not one.good)
    crowd = np.concatenate([np.zeros((600, 2), int), [[a, b] for a in range(4) for b in range(4)]])
    said = [one.words for one in verdicts_on(measure(crowd, (4, 4))) if not one.good]
    assert any("hourglass" in words for words in said)
    useless = np.column_stack([every, np.zeros(len(every), int)])
    said = [one.words for one in verdicts_on(measure(useless, (4, 4, 4, 1))) if not one.good]
    assert said == [next(words for words in said if "the last level tells 0.00 bits" in words)]


def test_a_config_says_how(mesh):
    narrow = dataclasses.replace(ResidualKMeans(), codes=(600,))
    with pytest.raises(Exception, match="400 vectors for 600 codes"):
        narrow.fit(Vectors(blobs(400, 4)[0], None, "x"), Fitting(mesh))
