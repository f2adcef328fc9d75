"""RQ-VAE: it starts as residual k-means, brings back more of the vectors, and can be killed."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from prefixmem_jax.config import Config
from prefixmem_jax.data.item_vectors import VectorBatch
from prefixmem_jax.data.pipeline import RowsInMemory, training_batches
from prefixmem_jax.errors import UserError
from prefixmem_jax.models.rq_autoencoder import RqAutoencoder
from prefixmem_jax.objectives import rq_vae as objective
from prefixmem_jax.parallel.mesh import make_mesh
from prefixmem_jax.quantizer_training import RUN, fit_quantizer
from prefixmem_jax.runs.checkpoint import saved_steps
from prefixmem_jax.runs.metrics import read_metrics
from prefixmem_jax.runs.run import Run
from prefixmem_jax.semantic_ids.quantizers.quantizer import level_name
from prefixmem_jax.semantic_ids.quantizers.residual_kmeans import ResidualKMeans
from prefixmem_jax.semantic_ids.quantizers.rq_vae import RqVae
from prefixmem_jax.semantic_ids.vectors import Vectors
from prefixmem_jax.training.hooks import Progress
from prefixmem_jax.training.loop import train

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


@pytest.fixture
def devices(monkeypatch):
    """Limits a training to so many of the devices."""

    def limit(count: int) -> None:
        monkeypatch.setattr(
            "prefixmem_jax.parallel.mesh.all_devices", lambda: jax.devices()[:count]
        )

    limit(1)
    return limit


def fit(config, array, folder):
    return fit_quantizer(config, Vectors(array, None, "x"), folder)


def error(config, fitted, array, mesh) -> float:
    codes = config.encode(fitted, array, mesh)
    return float(((array - config.decode(fitted, codes)) ** 2).mean() / array.var(axis=0).mean())


def assert_same(one, other):
    assert one.keys() == other.keys()
    for name in one:
        np.testing.assert_array_equal(one[name], other[name])


def test_it_starts_as_residual_kmeans(mesh, devices, tmp_path):
    array = curved()
    start = RqVae(**SIZES, steps=1, learning_rate=1e-12, decay=0.999999)
    kmeans = ResidualKMeans(codes=(16, 16))
    ours, theirs = (
        error(config, fit(config, array, tmp_path / config.name), array, mesh)
        for config in (start, kmeans)
    )
    assert ours == pytest.approx(theirs, rel=0.05)


def test_training_brings_back_more_than_kmeans(mesh, devices, tmp_path):
    array = curved()
    trained = RqVae(**SIZES, steps=600, learning_rate=5e-3)
    fitted = fit(trained, array, tmp_path / "ours")
    kmeans = ResidualKMeans(codes=(16, 16))
    ours = error(trained, fitted, array, mesh)
    theirs = error(kmeans, fit(kmeans, array, tmp_path / "theirs"), array, mesh)
    assert ours < 0.8 * theirs
    codes = trained.encode(fitted, array, mesh)
    assert min(len(np.unique(codes[:, level])) for level in range(2)) >= 14
    # One level says less than two.
    first = ((array - trained.decode(fitted, codes[:, :1])) ** 2).mean()
    assert first > 1.5 * ((array - trained.decode(fitted, codes)) ** 2).mean()
    # What is validated is what comes of it.
    validated = [r for r in read_metrics(tmp_path / "ours" / RUN) if "validation/loss" in r]
    assert [record["step"] for record in validated] == [100, 200, 300, 400, 500, 600]
    errors = [record["validation/reconstruction_error"] for record in validated]
    assert errors[-1] == pytest.approx(ours, rel=0.1) and errors[-1] < errors[0] < theirs


def test_eleven_levels_are_taken_off_in_their_order():
    """Not in that of their names, of which `level_10` comes before `level_2`."""
    codes, rng = (3,) * 11, np.random.default_rng(0)
    model = RqAutoencoder(6, 4, (8,), codes, nnx.Rngs(0))
    for level in range(11):
        codebook = getattr(model.codebooks, level_name(level))
        codebook[...] = rng.standard_normal((3, 4)) * 0.8**level
    vectors = jnp.asarray(rng.standard_normal((20, 6)), jnp.float32)
    left = np.asarray(model.encoder(vectors))
    committed = 0
    for level in range(11):
        codebook = np.asarray(getattr(model.codebooks, level_name(level))[...])
        nearest = ((left[:, None] - codebook) ** 2).sum(axis=-1).argmin(axis=1)
        left = left - codebook[nearest]
        committed = committed + (left**2).sum(axis=1)
    mesh = make_mesh(devices=jax.devices()[:1])
    with jax.set_mesh(mesh):
        placed = jax.device_put(vectors, NamedSharding(mesh, P(("data", "fsdp"), None)))
        found = jax.jit(lambda x: model(x).committed)(placed)
    np.testing.assert_allclose(found, committed, rtol=1e-5)


def test_the_last_code_is_the_nearest(mesh, devices, tmp_path):
    array = curved(400)
    config = RqVae(**SIZES, steps=20, latent=5)
    fitted = fit(config, array, tmp_path / "fit")
    codes = config.encode(fitted, array, mesh)
    distances = config.last_distances(fitted, array, codes)
    assert distances.shape == (400, 16) and fitted["level_1"].shape == (16, 5)
    np.testing.assert_allclose(
        distances[np.arange(400), codes[:, 1]], distances.min(axis=1), rtol=1e-3, atol=1e-3
    )


def test_a_killed_fit_goes_on_bit_identical(devices, tmp_path, monkeypatch):
    """Whether it had saved its state or not; codes are revived before and after."""
    config, array = RqVae(**SIZES, steps=310), curved(600)
    whole = fit(config, array, tmp_path / "whole")
    note_step, seen = Progress.note_step, []

    def killed_at(step):
        def noting(progress, *arguments):
            seen.append(progress.step)
            if progress.step == step:
                raise KeyboardInterrupt
            note_step(progress, *arguments)

        monkeypatch.setattr(Progress, "note_step", noting)

    for step, saved in ((60, []), (230, [200])):
        killed_at(step)
        with pytest.raises(KeyboardInterrupt):
            fit(config, array, tmp_path / "killed")
        assert saved_steps(tmp_path / "killed" / RUN) == saved
    killed_at(None)
    assert_same(fit(config, array, tmp_path / "killed"), whole)
    assert seen == [*range(61), *range(231), *range(200, 310)]
    assert_same(fit(config, array, tmp_path / "killed"), whole)  # it is done
    assert len(seen) == 61 + 231 + 110


def test_two_cannot_fit_in_one_folder(devices, tmp_path):
    config, run = RqVae(**SIZES, steps=5), Run(tmp_path / "fit" / RUN)
    other = dataclasses.replace(config, seed=1)
    with run.lock(), pytest.raises(UserError, match="another process fits something else there"):
        fit(config, curved(300), tmp_path / "fit")
    fitted = fit(config, curved(300), tmp_path / "fit")
    with run.lock():
        for one, words in ((config, "is training this run"), (other, "fits something else")):
            with pytest.raises(UserError, match=f"another process {words}"):
                fit(one, curved(300), tmp_path / "fit")
    assert_same(fit(config, curved(300), tmp_path / "fit"), fitted)


def test_four_devices_fit_as_one_does(devices, tmp_path):
    array, config = curved(600), RqVae(**SIZES, steps=5)
    one = fit(config, array, tmp_path / "one")
    devices(4)
    four = fit(config, array, tmp_path / "four")
    for name in one:
        np.testing.assert_allclose(four[name], one[name], rtol=1e-3, atol=1e-4)


def test_codes_that_nothing_is_nearest_to_come_back():
    config = objective.RqVae(width=12, latent=12, hidden=(64,), commitment=0.25, decay=0.99)
    near = curved(16)
    far = near.copy()
    far[3] = 1e3
    counts = np.full(16, 16, np.float32)
    counts[3], counts[5] = 0, 40
    params = {
        "scaling": {"mean": jnp.zeros(12), "scale": jnp.ones(())},
        "codebooks": {"level_1": jnp.asarray(far)},
        "counts": {"level_1": jnp.asarray(counts)},
    }
    sums = {
        "counts": {"level_1": jnp.asarray(counts)},
        "sums": {"level_1": jnp.asarray(counts[:, None] * near)},
    }
    moved = jax.jit(lambda step: config.moved(params, sums, step, jax.random.key(0))[0])
    before, after = moved(99), moved(100)
    assert before["codebooks"]["level_1"][3, 0] == 1e3 and before["counts"]["level_1"][3] == 0
    codebook, count = after["codebooks"]["level_1"], after["counts"]["level_1"]
    np.testing.assert_allclose(codebook[3], near[5], atol=0.1)  # where most vectors are
    assert np.abs(codebook[3] - codebook[5]).max() > 0
    others = np.delete(np.arange(16), [3, 5])
    np.testing.assert_allclose(codebook[others], near[others], rtol=1e-5)
    np.testing.assert_allclose(count[others], 16)
    assert count[3] == 1  # the first vector that comes decides where it is


def test_more_latent_numbers_than_there_are_is_refused(tmp_path):
    with pytest.raises(UserError, match="latent=13: the vectors have 12 numbers"):
        fit(RqVae(**SIZES, latent=13), curved(300), tmp_path / "fit")
    assert list(tmp_path.iterdir()) == []


def test_vectors_are_read_as_they_are_drawn(devices, tmp_path, monkeypatch):
    """Never all of them; what is in a file need not fit in memory."""
    np.save(tmp_path / "x.npy", curved(5000))
    vectors = Vectors(np.load(tmp_path / "x.npy", mmap_mode="r"), np.arange(5000)[::-1], "x")
    taken, take = [], Vectors.take

    def noting(self, items):
        if self is vectors:
            taken.append(len(items))
        return take(self, items)

    monkeypatch.setattr(Vectors, "take", noting)
    monkeypatch.setattr("prefixmem_jax.semantic_ids.vectors.PIECE", 12 * 1000)
    monkeypatch.setattr(objective, "SAMPLE", 500)
    config = dataclasses.replace(RqVae(**SIZES, steps=10), codes=(2, 2))
    fit_quantizer(config, vectors, tmp_path / "fit")
    assert (
        taken.count(256) >= 10 and max(taken) == 1000
    )  # as many as a piece, and as are validated on


def test_a_vector_that_is_not_finite_ends_it():
    array = curved(300)
    array[123, 4] = np.nan
    rows = VectorBatch(np.ones(300, np.float32), Vectors(array, None, "v.npy"))
    with pytest.raises(UserError, match=r"v.npy: the vector of item 123 is not finite"):
        next(training_batches(RowsInMemory(rows), 300, seed=0))


def test_it_is_trained_on_vectors_alone(tmp_path):
    keys = {"width": 3, "latent": 2, "hidden": (4,), "commitment": 0.25, "decay": 0.9}
    with pytest.raises(UserError, match="learns from items' vectors; expected"):
        train(Config("x", objective=objective.RqVae(**keys)), tmp_path / "run")
    assert not (tmp_path / "run").exists()
