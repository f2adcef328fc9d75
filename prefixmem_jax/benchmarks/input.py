"""From histories to batches: packing into files, reading as training does, and a train step."""

from __future__ import annotations

import dataclasses
import itertools
import resource
import tempfile
import time
from pathlib import Path
from typing import Any

import jax

from prefixmem_jax.benchmarks.fixtures import training
from prefixmem_jax.benchmarks.timing import in_its_own_process, machine, median_seconds
from prefixmem_jax.config import Config
from prefixmem_jax.config_files import load_config
from prefixmem_jax.data.generation import generate
from prefixmem_jax.data.generator import GeneratorConfig
from prefixmem_jax.data.pipeline import global_batch, training_batches
from prefixmem_jax.model_spec import ModelSpec
from prefixmem_jax.parallel.mesh import make_mesh
from prefixmem_jax.parallel.sharding import batch_sharding
from prefixmem_jax.training.loop import train
from prefixmem_jax.training_rows import pack, training_data, training_source

LENGTH = 10  # items of a history, on average
# Batches that are read: the first ones, which may lie ready when the clock starts, do not count.
UNTIMED, TIMED = 550, 500


def bench_input(interactions: int, shards: int, workers: int, repeats: int) -> dict[str, Any]:
    """Packs about so many generated interactions, reads the rows, and trains on them.

    The config is the quickstart's baseline, whose step is the fastest that it has. What is written
    goes into a temporary folder: about 20 bytes an interaction.

    Args:
      workers: processes that pack.
      repeats: timed train steps.

    Returns:
      machine, users, interactions, rows.
      packing: seconds, interactions_per_second, and peak: bytes resident in all its processes, at
        most (what they share counts in each).
      reading, step: tokens_per_second, of one process that does nothing else.
      ratio: of these two.
      training: peak: bytes resident in a process that takes a few train steps.
    """
    with tempfile.TemporaryDirectory() as folder:
        data, rows = Path(folder) / "data", Path(folder) / "rows"
        generator = GeneratorConfig(
            users=max(interactions // LENGTH, 1),
            codebook_sizes=(32, 64, 64, 64),
            children=(32, 8, 8, 8),
            mean_length=LENGTH,
        )
        about = in_its_own_process(generate, generator, data)
        config = load_config(
            "quickstart/baseline",
            [
                f"data.path={data}",
                f"data.packed={rows}",
                "steps=3",
                "evaluation.validation_examples=40",
            ],
        )
        measured = {
            "machine": machine(),
            "users": generator.users,
            "interactions": about["interactions"],
        }
        count, seconds, peak = in_its_own_process(_pack, config, rows, shards, workers)
        measured["rows"] = count
        measured["packing"] = {
            "seconds": seconds,
            "interactions_per_second": about["interactions"] / seconds,
            "peak": peak,
        }
        reading, step = _read_and_step(config, repeats)
        measured["reading"] = {"tokens_per_second": reading}
        measured["step"] = {"tokens_per_second": step}
        measured["ratio"] = reading / step
        trained = in_its_own_process(_train, config, Path(folder) / "run")
        measured["training"] = {"peak": trained}
        return measured


def _pack(config: Config, out: Path, shards: int, workers: int) -> tuple[int, float, int]:
    """Rows, seconds, and the peak of resident memory."""
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, packed=None))
    started = time.perf_counter()
    rows = pack(config, out, shards, workers)
    seconds = time.perf_counter() - started
    return rows, seconds, _peak() + workers * _peak(resource.RUSAGE_CHILDREN)


def _peak(whose: int = resource.RUSAGE_SELF) -> int:
    """Of the process, or of the largest of its children."""
    return 1024 * resource.getrusage(whose).ru_maxrss


def _read_and_step(config: Config, repeats: int) -> tuple[float, float]:
    """Tokens per second that training's pipeline gives, and that a train step takes."""
    data = training_data(config)
    iterator = training_batches(training_source(config, data), config.data.batch_size, config.seed)
    for _ in range(UNTIMED):
        next(iterator)
    started = time.perf_counter()
    for _ in range(TIMED):
        next(iterator)
    reading = (time.perf_counter() - started) / TIMED
    spec = ModelSpec.create(config, data.vocabulary, make_mesh(devices=jax.devices()[:1]))
    local = itertools.islice(iterator, 8)
    batches = [global_batch(batch, batch_sharding(spec.mesh)) for batch in local]
    iterator.close()  # or its threads go on reading ahead
    with jax.set_mesh(spec.mesh):
        step = median_seconds({"step": training(spec, batches)}, repeats, "train step")["step"]
    tokens = config.data.batch_size * config.data.sequence_length
    return tokens / reading, tokens / step


def _train(config: Config, folder: Path) -> int:
    """The peak of resident memory of a run."""
    train(config, folder)
    return _peak()


def describe(measured: dict[str, Any]) -> str:
    """The measurements as text."""
    packing = measured["packing"]
    reading, step = (measured[name]["tokens_per_second"] for name in ("reading", "step"))
    return "\n".join(
        [
            f"{measured['interactions']:,} interactions of {measured['users']:,} users, "
            f"{measured['rows']:,} packed rows",
            f"  packing   {packing['interactions_per_second']:12,.0f} interactions/s, "
            f"peak of host memory {packing['peak'] / 1e9:.2f} GB",
            f"  reading   {reading:12,.0f} tokens/s",
            f"  training  {step:12,.0f} tokens/s, "
            f"peak of host memory {measured['training']['peak'] / 1e9:.2f} GB",
            f"the pipeline gives {measured['ratio']:.0f} x the tokens that a step takes",
        ]
    )


def panels(measured: dict[str, Any]) -> list[tuple[str, dict[str, float]]]:
    """What the plot shows."""
    tokens = {name: measured[name]["tokens_per_second"] / 1e6 for name in ("reading", "step")}
    peaks = {name: measured[name]["peak"] / 1e9 for name in ("packing", "training")}
    return [("million tokens/s", tokens), ("host memory, GB", peaks)]
