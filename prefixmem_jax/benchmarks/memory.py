"""Does a train step's cost depend on the size of the memory tables? It must not.

    python -m prefixmem_jax.benchmarks.memory [--rows 14 17 20] [--json FILE]

Runs the whole train step of the quickstart's decoder (5,120 tokens, SIDs of 5 levels, 16 tables,
d_mem 64) at several table sizes, in turn within one process so that a noisy machine disturbs
all alike, and prints the ratio of the median step times to the smallest table's.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from prefixmem_jax.config import Config, DataConfig, PrefixMemoryConfig
from prefixmem_jax.files import write_json
from prefixmem_jax.parallel.mesh import make_mesh
from prefixmem_jax.parallel.sharding import batch_sharding
from prefixmem_jax.semantic_ids.space import SidSpace
from prefixmem_jax.training.step import Trainer

SPACE = SidSpace((256,) * 5)
ITEMS, LENGTH, BATCH = 25, 128, 40


def random_batches(count: int) -> list[dict[str, np.ndarray]]:
    """Rows of random items, in the layout of `data.sequences`."""
    rng = np.random.default_rng(0)
    found = []
    for _ in range(count):
        sids = rng.integers(0, 256, (BATCH, ITEMS, 5))
        tokens = np.zeros((BATCH, LENGTH), np.int32)
        tokens[:, 0] = 1
        tokens[:, 1 : 1 + 5 * ITEMS] = SPACE.encode(sids).reshape(BATCH, -1)
        segments = (tokens > 0).astype(np.int32)
        positions = np.broadcast_to(np.arange(LENGTH, dtype=np.int32), tokens.shape)
        found.append(
            {
                "tokens": tokens,
                "segment_ids": segments,
                "positions": positions,
                "loss_mask": segments.astype(np.float32),
            }
        )
    return found


def step_times(rows_per_table: list[int], repeats: int) -> dict[int, list[float]]:
    """Seconds of single steps by rows per table, measured in turn."""
    mesh = make_mesh(devices=jax.devices()[:1])
    sharding = batch_sharding(mesh)
    runs: dict[int, list[Any]] = {}
    for rows in rows_per_table:
        encoder = PrefixMemoryConfig(target_levels=(4, 5), orders=4, heads=4, rows=rows, d_mem=64)
        data = DataConfig(sequence_length=LENGTH, batch_size=BATCH)
        trainer = Trainer.create(Config("benchmark", encoder=encoder, data=data), SPACE, mesh)
        runs[rows] = [trainer.compile_train_step(), trainer.init_sharded(0)]
    with jax.set_mesh(mesh):
        batches = [
            {name: jax.device_put(jnp.asarray(array), sharding) for name, array in batch.items()}
            for batch in random_batches(repeats + 3)
        ]
    times: dict[int, list[float]] = {rows: [] for rows in rows_per_table}
    for index, batch in enumerate(batches):
        for rows, run in runs.items():
            started = time.perf_counter()
            run[1], metrics = run[0](run[1], batch)
            jax.block_until_ready((run[1], metrics))
            if index >= 3:  # the first steps touch fresh memory pages
                times[rows].append(time.perf_counter() - started)
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, nargs="+", default=[14, 17, 20], metavar="LOG2")
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    times = step_times([2**power for power in options.rows], options.repeats)
    medians = {rows: statistics.median(values) for rows, values in times.items()}
    first = medians[2 ** options.rows[0]]
    for rows, median in medians.items():
        print(f"{rows:>9,} rows per table: {median * 1e3:7.1f} ms a step, {median / first:.3f}x")
    if options.json:
        write_json(options.json, {"step_seconds": medians})


if __name__ == "__main__":
    main()
