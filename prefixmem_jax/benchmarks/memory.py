"""What the memory table costs: by its size, by its optimizer, and by how it is fetched."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from prefixmem_jax.benchmarks.fixtures import (
    batch_addresses,
    dense_training,
    one_device_model,
    random_batches,
    table_training,
    training,
)
from prefixmem_jax.benchmarks.timing import machine, median_seconds
from prefixmem_jax.config_groups import MeshConfig
from prefixmem_jax.memory.table import ADDRESSES, Lookup, Table, spread
from prefixmem_jax.model_spec import ModelSpec
from prefixmem_jax.parallel.mesh import make_mesh
from prefixmem_jax.parallel.sharding import row_spec
from prefixmem_jax.planning.hlo import Program
from prefixmem_jax.sid_encoders.prefix_memory import PrefixMemoryConfig

LENGTH, CODES = 128, 256  # as in the quickstart


def bench_memory(
    rows: list[int], compared_rows: int, d_mem: int, repeats: int, batch_size: int
) -> dict[str, Any]:
    """Measures the table on this machine.

    Args:
      rows: rows per table (16 tables) of the steps to compare.
      compared_rows: the same, for the comparison with dense AdamW.
      batch_size: sequences of 128 tokens in a step.

    Returns:
      machine: what it ran on.
      step_seconds: whole train step (quickstart's decoder) by rows per table.
      row_wise_seconds, dense_seconds: the table's part of a step alone at `compared_rows`: read
        rows, gradient, Adam on the rows in the batch; or a gradient of the whole table and AdamW
        on all of it. row_wise_step_seconds, dense_step_seconds: whole steps with either.
      fetch: on all devices, seconds and bytes that a device sends, of `exchange` (ours), of a
        gather that XLA partitions, and of a masked all-gather.
      bandwidth: bytes/s on one device of `stream` (a copy), `random_rows` (a plain gather of
        rows in random order) and `fetch` (ours, duplicates removed and rows spread over the
        batch); `fetch_rows_per_second` counts addresses.
    """

    def model(rows: int) -> ModelSpec:
        memory = PrefixMemoryConfig(target_levels=(4, 5), orders=4, heads=4, rows=rows, d_mem=d_mem)
        return one_device_model("quickstart", memory, batch_size, LENGTH, CODES)

    measured: dict[str, Any] = {"machine": machine(), "d_mem": d_mem, "tables": 16}
    measured["tokens"] = batch_size * LENGTH
    measured["step_seconds"] = _step_by_rows({size: model(size) for size in rows}, repeats)
    measured["compared_rows"] = compared_rows
    fewer = max(repeats // 3, 3)
    for what, seconds in (
        ("", _row_wise_and_dense_table(model(compared_rows), fewer)),
        ("step_", _row_wise_and_dense_step(model(compared_rows), fewer)),
    ):
        measured |= {f"{kind}_{what}seconds": value for kind, value in seconds.items()}
    measured["fetch"] = _compare_fetches(model(compared_rows), repeats)
    measured["bandwidth"] = _bandwidth(model(compared_rows), repeats)
    return measured


def _step_by_rows(models: dict[int, ModelSpec], repeats: int) -> dict[int, float]:
    first = next(iter(models.values()))
    batches = random_batches(first, 8)
    with jax.set_mesh(first.mesh):
        calls = {size: training(spec, batches) for size, spec in models.items()}
        return median_seconds(calls, repeats, "step by rows per table")


def _row_wise_and_dense_table(spec: ModelSpec, repeats: int) -> dict[str, float]:
    batches = random_batches(spec, 8)
    calls = {
        "row_wise": table_training(spec, batches, dense=False),
        "dense": table_training(spec, batches, dense=True),
    }
    return median_seconds(calls, repeats, "table, row-wise and dense")


def _row_wise_and_dense_step(spec: ModelSpec, repeats: int) -> dict[str, float]:
    batches = random_batches(spec, 8)
    calls = {
        "row_wise": training(spec, batches),
        "dense": dense_training(spec, batches),
    }
    return median_seconds(calls, repeats, "step, row-wise and dense")


def _table_and_addresses(spec: ModelSpec) -> tuple[Table, np.ndarray]:
    """All rows as one table's, so that an address is a row's number among them."""
    (addresses,) = batch_addresses(spec, random_batches(spec, 1))
    tables = spec.table.tables
    numbers = np.asarray(addresses) * tables + np.arange(tables, dtype=np.int32)
    together = replace(spec.table, rows=spec.table.rows * tables, tables=1)
    return together, np.where(addresses < 0, -1, numbers)


def _compare_fetches(spec: ModelSpec, repeats: int) -> dict[str, Any]:
    table, addresses = _table_and_addresses(spec)
    lines, lanes = table.shape
    explicit = make_mesh(MeshConfig())
    automatic = jax.make_mesh((jax.device_count(),), ("x",), (AxisType.Auto,))

    def masked_all_gather(mine: jax.Array, ids: jax.Array) -> jax.Array:
        everyone = jax.lax.all_gather(ids, "x", tiled=True)
        local = everyone - jax.lax.axis_index("x") * mine.shape[0] * (lanes // table.width)
        here = (local >= 0) & (local < mine.shape[0] * (lanes // table.width))
        read = table_rows(mine, jnp.where(here, local, -1))
        return jax.lax.psum_scatter(read, "x", scatter_dimension=0, tiled=True)

    def table_rows(memory: jax.Array, ids: jax.Array) -> jax.Array:
        by_row = memory.reshape(-1, table.width)
        return jnp.where(ids[..., None] < 0, 0, by_row[jnp.maximum(ids, 0)])

    variants: dict[str, tuple[Any, Callable, P, P]] = {
        "exchange": (
            explicit,
            lambda memory, ids: spread(table.fetch(memory, Lookup(ids))).by_position,
            row_spec(),
            ADDRESSES,
        ),
        "xla_partitioned_gather": (automatic, table_rows, P("x"), P("x")),
        "masked_all_gather": (
            automatic,
            jax.shard_map(
                masked_all_gather, mesh=automatic, in_specs=(P("x"), P("x")), out_specs=P("x")
            ),
            P("x"),
            P("x"),
        ),
    }
    calls, sent = {}, {}
    for name, (mesh, function, of_rows, of_ids) in variants.items():
        with jax.set_mesh(mesh):
            memory = jax.jit(
                lambda: jnp.zeros((lines, lanes)), out_shardings=NamedSharding(mesh, of_rows)
            )()
            ids = jax.device_put(addresses, NamedSharding(mesh, of_ids))
            out = NamedSharding(mesh, of_ids)
            compiled = jax.jit(function, out_shardings=out).lower(memory, ids).compile()
        sent[name] = sum(c.bytes for c in Program.parse(compiled.as_text()).collectives())
        calls[name] = lambda run=compiled, memory=memory, ids=ids: run(memory, ids)
    seconds = median_seconds(calls, repeats, "fetches")
    return {name: {"seconds": seconds[name], "bytes_sent": sent[name]} for name in calls}


def _bandwidth(spec: ModelSpec, repeats: int) -> dict[str, float]:
    table, addresses = _table_and_addresses(spec)
    mesh = make_mesh(devices=jax.devices()[:1])
    used = int((addresses >= 0).sum())
    order = np.random.default_rng(0).integers(0, table.padded_rows, used).astype(np.int32)
    with jax.set_mesh(mesh):
        sharding = NamedSharding(mesh, row_spec())
        memory = jax.jit(lambda: jnp.zeros(table.shape), out_shardings=sharding)()
        placed = jax.device_put(addresses, NamedSharding(mesh, ADDRESSES))
        fetch = jax.jit(lambda memory, ids: spread(table.fetch(memory, Lookup(ids))).by_position)
    plain = jnp.zeros(table.shape)
    gather = jax.jit(table.gather)
    copy = jax.jit(lambda x: x + 1)
    ids = jnp.asarray(order)

    def fetched() -> jax.Array:
        with jax.set_mesh(mesh):
            return fetch(memory, placed)

    seconds = median_seconds(
        {
            "stream": lambda: copy(plain),
            "random_rows": lambda: gather(plain, ids),
            "fetch": fetched,
        },
        repeats,
        "bandwidth",
    )
    row_bytes = used * table.width * 4
    return {
        "stream": 2 * plain.nbytes / seconds["stream"],
        "random_rows": row_bytes / seconds["random_rows"],
        "fetch": row_bytes / seconds["fetch"],
        "fetch_rows_per_second": used / seconds["fetch"],
    }


def describe(measured: dict[str, Any]) -> str:
    """The measurements as text, ratios first."""
    steps = measured["step_seconds"]
    smallest = steps[min(steps)]
    on = measured["machine"]
    lines = [f"{on['device']}, {on['devices']} devices, {measured['tokens']:,} tokens a step"]
    lines += [
        f"  step, {rows:>9,} rows per table  {value * 1e3:8.1f} ms  {value / smallest:6.3f}x"
        for rows, value in steps.items()
    ]
    for what, key in (("table alone", ""), ("whole step", "step_")):
        row_wise, dense = measured[f"row_wise_{key}seconds"], measured[f"dense_{key}seconds"]
        lines.append(
            f"  {what} at {measured['compared_rows']:,} rows: "
            f"row-wise {row_wise * 1e3:.1f} ms, dense AdamW {dense * 1e3:.1f} ms: "
            f"{dense / row_wise:.1f}x"
        )
    for name, one in measured["fetch"].items():
        lines.append(
            f"  fetch, {name:24s}{one['seconds'] * 1e3:8.2f} ms, each device sends "
            f"{one['bytes_sent'] / 2**20:8.3f} MiB"
        )
    rates = measured["bandwidth"]
    lines.append(
        f"  rows fetched: {rates['fetch_rows_per_second'] / 1e6:.1f} million/s, "
        f"{rates['fetch'] / 1e9:.2f} GB/s; random rows {rates['random_rows'] / 1e9:.2f} GB/s; "
        f"copy {rates['stream'] / 1e9:.1f} GB/s"
    )
    return "\n".join(lines)


def panels(measured: dict[str, Any]) -> list[tuple[str, dict[str, float]]]:
    """What the plot shows."""
    return [
        (
            "train step by rows per table, ms",
            {f"{k:,}": 1e3 * v for k, v in measured["step_seconds"].items()},
        ),
        (
            f"table alone, {measured['compared_rows']:,} rows per table, ms",
            {
                "row-wise": 1e3 * measured["row_wise_seconds"],
                "dense AdamW": 1e3 * measured["dense_seconds"],
            },
        ),
        (
            f"fetch on {measured['machine']['devices']} devices, ms",
            {
                name.replace("_", " "): 1e3 * one["seconds"]
                for name, one in measured["fetch"].items()
            },
        ),
    ]
