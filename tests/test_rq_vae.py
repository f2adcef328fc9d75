"""RQ-VAE: it starts as residual k-means, brings back more of the vectors, and can be killed."""

import jax
import numpy as np
import pytest

from prefixmem_jax.errors import UserError
from prefixmem_jax.parallel.mesh import make_mesh
from prefixmem_jax.semantic_ids.quantizers.residual_kmeans import ResidualKMeans
from prefixmem_jax.semantic_ids.quantizers.rq_vae import RqVae
from prefixmem_jax.semantic_ids.vectors import Vectors

SIZES = {"codes": (16, 16), "hidden": (64,), "batch_size": 256}


def curved(count=3000, width=12, seed=0) -> np.ndarray:
    """Vectors on a surface that no few sums of centroids follow."""
    rng = np.random.default_rng(seed)
    hidden = rng.standard_normal((count, 2))
    waves = np.sin(hidden @ rng.standard_normal((2, 24)) * 1.5)
    return (3 + 2 * waves @ rng.standard_normal((24, width))).astype(np.float32)


@pytest.fixture(scope="module")
def mesh():
    return make_mesh(devices=jax.devices()[:1])


def fit(config, array, mesh):
    vectors = Vectors(array, None, "x")
    return config.fit(vectors, mesh, {}, lambda state: None)


def error(config, fitted, array, mesh) -> float:
    codes = config.encode(fitted, array, mesh)
    return float(((array - config.decode(fitted, codes)) ** 2).mean() / array.var(axis=0).mean())


def test_it_starts_as_residual_kmeans(mesh):
    array = curved()
    start = RqVae(**SIZES, steps=1, learning_rate=1e-12, decay=0.999999)
    kmeans = ResidualKMeans(codes=(16, 16))
    ours, theirs = (
        error(config, fit(config, array, mesh), array, mesh) for config in (start, kmeans)
    )
    assert ours == pytest.approx(theirs, rel=0.05)


def test_training_brings_back_more_than_kmeans(mesh):
    array = curved()
    trained = RqVae(**SIZES, steps=600, learning_rate=5e-3)
    fitted = fit(trained, array, mesh)
    kmeans = ResidualKMeans(codes=(16, 16))
    ours = error(trained, fitted, array, mesh)
    theirs = error(kmeans, fit(kmeans, array, mesh), array, mesh)
    assert ours < 0.8 * theirs
    codes = trained.encode(fitted, array, mesh)
    assert min(len(np.unique(codes[:, level])) for level in range(2)) >= 14
    # One level says less than two.
    first = ((array - trained.decode(fitted, codes[:, :1])) ** 2).mean()
    assert first > 1.5 * ((array - trained.decode(fitted, codes)) ** 2).mean()


def test_the_last_code_is_the_nearest(mesh):
    array = curved(400)
    config = RqVae(**SIZES, steps=20, latent=5)
    fitted = fit(config, array, mesh)
    codes = config.encode(fitted, array, mesh)
    distances = config.last_distances(fitted, array, codes)
    assert distances.shape == (400, 16) and fitted["level_1"].shape == (16, 5)
    np.testing.assert_allclose(
        distances[np.arange(400), codes[:, 1]], distances.min(axis=1), rtol=1e-3, atol=1e-3
    )


def test_a_killed_fit_goes_on_bit_identical(mesh):
    config, vectors, states = RqVae(**SIZES, steps=250), Vectors(curved(600), None, "x"), []
    whole = config.fit(vectors, mesh, {}, lambda state: states.append(dict(state)))
    assert len(states) == 2
    for state in states:
        again = config.fit(vectors, mesh, state, lambda state: None)
        assert again.keys() == whole.keys()
        for name in whole:
            np.testing.assert_array_equal(again[name], whole[name])


def test_eight_devices_fit_as_one_does(mesh):
    array, config = curved(600), RqVae(**SIZES, steps=5)
    one, eight = fit(config, array, mesh), fit(config, array, make_mesh())
    for name in one:
        np.testing.assert_allclose(eight[name], one[name], rtol=1e-3, atol=1e-4)


def test_codes_that_nothing_is_nearest_to_come_back(mesh):
    config = RqVae(**SIZES)
    state, _ = config._start(Vectors(curved(600), None, "x"), mesh)
    far = state.codebooks[0].copy()
    far[3] = 1e3
    counts = state.counts[0].copy()
    counts[3] = 0
    state = state._replace(codebooks=(far, state.codebooks[1]), counts=(counts, state.counts[1]))
    revived = config._revived(state, 100)
    assert np.abs(revived.codebooks[0][3]).max() < 100
    np.testing.assert_allclose(
        revived.sums[0], revived.counts[0][:, None] * revived.codebooks[0], rtol=1e-6
    )
    assert revived.counts[0].min() > 0


def test_more_latent_numbers_than_there_are_is_refused(mesh):
    with pytest.raises(UserError, match="latent=13: the vectors have 12 numbers"):
        fit(RqVae(**SIZES, latent=13), curved(300), mesh)
