"""`prefixmem bench`: one function for each benchmark."""

from __future__ import annotations

import argparse
import os

from prefixmem_jax.cli.verbs import start


def bench(options: argparse.Namespace) -> None:
    from prefixmem_jax.benchmarks.timing import bar_plot
    from prefixmem_jax.files import write_json
    from prefixmem_jax.planning.topology import simulate_cpu_devices

    if options.benchmark is not bench_input:  # which starts a run: on all devices that there are
        simulate_cpu_devices(8)
    if getattr(options, "peer", False):  # or JAX takes most of a GPU's memory before torch's turn
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    start()
    module, measured = options.benchmark(options)
    print(module.describe(measured))
    if options.json:
        write_json(options.json, measured)
    if options.plot:
        bar_plot(options.plot, module.panels(measured))


def bench_memory(options: argparse.Namespace):
    from prefixmem_jax.benchmarks import memory

    return memory, memory.bench_memory(
        options.rows, options.compared_rows, options.d_mem, options.repeats, options.batch_size
    )


def bench_step(options: argparse.Namespace):
    from prefixmem_jax.benchmarks import step

    return step, step.bench_step(
        options.decoder,
        options.rows,
        options.d_mem,
        options.repeats,
        options.items,
        options.negatives,
        options.batch_size,
        options.peer,
    )


def bench_decode(options: argparse.Namespace):
    from prefixmem_jax.benchmarks import decode

    return decode, decode.bench_decode(
        options.decoder,
        options.catalogues,
        options.beams,
        options.users,
        options.levels,
        options.codes,
        options.repeats,
        options.peer,
    )


def bench_sids(options: argparse.Namespace):
    from prefixmem_jax.benchmarks import sids

    return sids, sids.bench_sids(
        options.vectors,
        options.width,
        options.levels,
        options.codes,
        options.iterations,
        options.steps,
        not options.no_peer,
    )


def bench_load(options: argparse.Namespace):
    from prefixmem_jax.benchmarks import load
    from prefixmem_jax.files import parse_size

    return load, load.bench_load(parse_size(options.size, "--size"))


def bench_input(options: argparse.Namespace):
    from prefixmem_jax.benchmarks import input as module

    return module, module.bench_input(
        options.interactions, options.shards, options.workers, options.repeats
    )
