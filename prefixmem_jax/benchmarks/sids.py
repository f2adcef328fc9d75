"""Vectors to codes: our quantizers, and faiss beside them where it is installed."""

from __future__ import annotations

import contextlib
import importlib.util
import re
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from prefixmem_jax.benchmarks.timing import machine
from prefixmem_jax.errors import UserError
from prefixmem_jax.parallel.mesh import make_mesh
from prefixmem_jax.progress import say
from prefixmem_jax.quantizer_training import fit_quantizer
from prefixmem_jax.semantic_ids.quantizers.quantizer import Quantizer
from prefixmem_jax.semantic_ids.quantizers.residual_kmeans import ResidualKMeans
from prefixmem_jax.semantic_ids.quantizers.rq_vae import RqVae
from prefixmem_jax.semantic_ids.vectors import Vectors

# Vectors that are made at a time, and numbers that each is a function of.
_PIECE, _FACTORS = 1 << 16, 24
# Fits, encodes and decodes vectors.
Fit, Encode = Callable[[], Any], Callable[[Any], np.ndarray]
Codec = tuple[Fit, Encode, Callable[[Any, np.ndarray], np.ndarray]]


def bench_sids(
    count: int, width: int, levels: int, codes: int, iterations: int, steps: int, peer: bool
) -> dict[str, Any]:
    """Fits and encodes `count` random vectors; every system has all of the machine's cores.

    The vectors are in a file, as items' are; faiss wants them in memory, and so comes last.

    Args:
      iterations: of k-means, ours and faiss's, which both see at most 256 vectors a code.
      steps: of RQ-VAE; 0 leaves it out.
      peer: with faiss, where it is installed.

    Returns:
      machine; by system fit_seconds, encode_seconds (all vectors), peak: most bytes that the
      process had in memory meanwhile, but for pages of files, and error: what does not come back,
      as a share of the vectors' variance.
    """
    if codes & (codes - 1):
        raise UserError(f"--codes {codes}: expected a power of two, as faiss wants")
    with tempfile.TemporaryDirectory() as folder:
        array = _vectors(Path(folder) / "vectors.npy", count, width)
        return _measured(array, levels, codes, iterations, steps, peer)


def _measured(
    array: np.ndarray, levels: int, codes: int, iterations: int, steps: int, peer: bool
) -> dict[str, Any]:
    (count, width), sizes, mesh = array.shape, (codes,) * levels, make_mesh()
    systems = {"residual_kmeans": _ours(ResidualKMeans(sizes, iterations=iterations), array, mesh)}
    if steps:
        systems["rq_vae"] = _ours(RqVae(sizes, steps=steps), array, mesh)
    if peer and importlib.util.find_spec("faiss") is not None:
        systems["faiss"] = _faiss(array, levels, codes, iterations)
    variance = _variance(array)
    measured: dict[str, Any] = {
        "machine": machine(),
        "vectors": [count, width],
        "codes": list(sizes),
        "systems": {},
    }
    for name, (fit, encode, decode) in systems.items():
        say(f"{name} ...")
        with _peak() as peak:
            start = time.perf_counter()
            fitted = fit()
            between = time.perf_counter()
            found = encode(fitted)
            end = time.perf_counter()
        lost = 0.0
        for first in range(0, count, _PIECE):
            back = decode(fitted, found[first : first + _PIECE])
            lost += float(((array[first : first + _PIECE] - back) ** 2).sum(dtype=np.float64))
        measured["systems"][name] = {
            "fit_seconds": between - start,
            "encode_seconds": end - between,
            "peak": peak[0],
            "error": lost / count / variance,
        }
    return measured


@contextlib.contextmanager
def _peak() -> Iterator[list[int]]:
    """The most bytes of memory that no file stands for, looked at twenty times a second."""
    peak, ended = [0], threading.Event()

    def watch() -> None:
        last = False
        while not last:
            last = ended.wait(0.05)  # and looks once more
            status = Path("/proc/self/status").read_text()
            peak[0] = max(peak[0], 1024 * int(re.search(r"RssAnon:\s*(\d+)", status)[1]))

    watching = threading.Thread(target=watch)
    watching.start()
    try:
        yield peak
    finally:
        ended.set()
        watching.join()


def _variance(array: np.ndarray) -> float:
    """Of all numbers of a vector together, without a copy of the vectors."""
    mean = array.mean(axis=0, dtype=np.float64)
    pieces = (array[first : first + _PIECE] for first in range(0, len(array), _PIECE))
    return sum(float(((piece - mean) ** 2).sum()) for piece in pieces) / len(array)


def _vectors(file: Path, count: int, width: int) -> np.ndarray:
    """Vectors on a curved surface, with noise: float32 [count, width], in a file."""
    rng = np.random.default_rng(0)
    mix = rng.standard_normal((_FACTORS, width)).astype(np.float32)
    array = np.lib.format.open_memmap(file, "w+", np.float32, (count, width))
    for first in range(0, count, _PIECE):
        size = min(_PIECE, count - first)
        factors = rng.standard_normal((size, _FACTORS), np.float32)
        noise = rng.standard_normal((size, width), np.float32)
        array[first : first + size] = np.tanh(factors @ mix / 3) + 0.1 * noise
    array.flush()
    return np.load(file, mmap_mode="r")


def _ours(config: Quantizer, array: np.ndarray, mesh: jax.sharding.Mesh) -> Codec:
    vectors = Vectors(array, None, "random vectors")

    def fitted_afresh() -> Any:
        with tempfile.TemporaryDirectory() as folder:
            return fit_quantizer(config, vectors, Path(folder) / "fit")

    def encode(fitted: Any) -> np.ndarray:
        return np.concatenate([config.encode(fitted, piece, mesh) for _, piece in vectors.pieces()])

    return (
        fitted_afresh,
        encode,
        config.decode,
    )


def _faiss(array: np.ndarray, levels: int, codes: int, iterations: int) -> Codec:
    import faiss

    array, bits = np.array(array), (codes - 1).bit_length()

    def fit() -> Any:
        quantizer = faiss.ResidualQuantizer(array.shape[1], levels, bits)
        quantizer.train_type = faiss.ResidualQuantizer.Train_default
        quantizer.max_beam_size = 1
        quantizer.cp.niter = iterations
        quantizer.cp.max_points_per_centroid = 256
        quantizer.train(array)
        return quantizer

    return fit, lambda fitted: fitted.compute_codes(array), lambda fitted, c: fitted.decode(c)


def describe(measured: dict[str, Any]) -> str:
    """The measurements as text."""
    count, width = measured["vectors"]
    lines = [f"{count:,} vectors of {width} numbers to {measured['codes']} codes", ""]
    lines.append(f"  {'':16s}{'fit':>10s}{'encode':>10s}{'memory':>10s}{'error':>10s}")
    for name, one in measured["systems"].items():
        lines.append(
            f"  {name:16s}{one['fit_seconds']:9.1f}s{one['encode_seconds']:9.1f}s"
            f"{one['peak'] / 1e9:8.2f}GB{one['error']:10.2%}"
        )
    systems = measured["systems"]
    if "faiss" in systems:
        ours, theirs = (
            systems[name]["fit_seconds"] + systems[name]["encode_seconds"]
            for name in ("residual_kmeans", "faiss")
        )
        lines.append(f"\n  residual_kmeans took {ours / theirs:.2f} x the time of faiss")
    return "\n".join(lines)


def panels(measured: dict[str, Any]) -> list[tuple[str, dict[str, float]]]:
    """What the plot shows."""
    systems = measured["systems"]
    return [
        (title, {name: one[key] / unit for name, one in systems.items()})
        for title, key, unit in (
            ("fit, seconds", "fit_seconds", 1),
            ("encode, seconds", "encode_seconds", 1),
            ("memory, GB", "peak", 1e9),
            ("error, share of variance", "error", 1),
        )
    ]
