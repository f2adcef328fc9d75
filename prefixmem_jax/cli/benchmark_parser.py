"""What `prefixmem bench` takes."""

from __future__ import annotations

import argparse
import os

from prefixmem_jax.cli import benchmark_verbs
from prefixmem_jax.cli.arguments import described, new_file, number_from, positive

DECODERS = ("4-layer", "quickstart", "qwen3-0.6b", "qwen3-1.7b")


def add_benchmarks(benchmarks: argparse._SubParsersAction) -> None:
    def benchmark(name: str, run, summary: str, examples: str) -> argparse.ArgumentParser:
        added = benchmarks.add_parser(name, help=summary, **described(summary, examples))
        added.set_defaults(verb=benchmark_verbs.bench, benchmark=run)
        added.add_argument("--json", type=new_file, metavar="FILE", help="write the numbers there")
        added.add_argument(
            "--plot", type=new_file, metavar="FILE", help="write a picture there (.png)"
        )
        return added

    memory = benchmark(
        "memory",
        benchmark_verbs.bench_memory,
        "The memory table alone: rows, optimizers, exchange.",
        "  prefixmem bench memory --rows 16384 1048576 --plot memory.png",
    )
    memory.add_argument(
        "--rows",
        type=positive,
        nargs="+",
        default=[2**14, 2**17, 2**20],
        metavar="T",
        help="rows per table (default: 16384 131072 1048576)",
    )
    memory.add_argument(
        "--compared-rows",
        type=positive,
        default=500_000,
        metavar="T",
        help="rows per table where dense AdamW is compared (default: %(default)s)",
    )
    step = benchmark(
        "step",
        benchmark_verbs.bench_step,
        "A whole train step without and with the SID encoder.",
        "  prefixmem bench step --decoder qwen3-0.6b --rows 5000000 --d-mem 256 --peer # on a GPU\n"
        "  prefixmem bench step --items 1000000   # and an item head over so many items",
    )
    step.add_argument(
        "--items",
        type=positive,
        default=0,
        metavar="N",
        help="also time an item head over a catalogue of so many items",
    )
    step.add_argument(
        "--negatives",
        type=positive,
        default=1024,
        metavar="N",
        help="items that it draws in a step (default: %(default)s)",
    )
    step.add_argument(
        "--rows", type=positive, default=500_000, metavar="T", help="rows per table (%(default)s)"
    )
    step.add_argument(
        "--decoder",
        choices=DECODERS,
        default="quickstart",
        help="whose shape (default: %(default)s)",
    )
    step.add_argument(
        "--peer",
        action="store_true",
        help="also time Hugging Face's decoder of the same shape under torch.compile (needs torch)",
    )
    for added, size in ((memory, 40), (step, None)):
        added.add_argument(
            "--batch-size",
            type=positive,
            default=size,
            metavar="N",
            help=f"sequences in a step (default: {size or 'by decoder, 40 of 128 or 8 of 1024'})",
        )
        added.add_argument(
            "--d-mem", type=positive, default=64, metavar="N", help="memory width (default: 64)"
        )
        added.add_argument(
            "--repeats", type=positive, default=30, metavar="N", help="timed calls (default: 30)"
        )
    decode = benchmark(
        "decode",
        benchmark_verbs.bench_decode,
        "Beam search, constrained to catalogues of several sizes and not.",
        "  prefixmem bench decode --catalogues 10000 1000000 --beams 20 100\n"
        "  prefixmem bench decode --decoder qwen3-0.6b --users 32 --beams 50 200 --peer",
    )
    decode.add_argument(
        "--decoder",
        choices=DECODERS,
        default="4-layer",
        help="whose shape (default: %(default)s, d_model 256)",
    )
    decode.add_argument(
        "--peer",
        action="store_true",
        help="also time Hugging Face's beam search with the same shape (needs torch)",
    )
    for flag, default, what in (
        ("--catalogues", [10_000, 1_000_000, 10_000_000], "random SIDs to constrain to"),
        ("--beams", [10, 70, 500], "widths of the beam"),
    ):
        decode.add_argument(
            flag,
            type=positive,
            nargs="+",
            default=default,
            metavar="N",
            help=f"{what} (default: {' '.join(map(str, default))})",
        )
    add_counts(
        decode,
        ("--users", 2, "in one batch"),
        ("--levels", 5, "of the SIDs"),
        ("--codes", 2048, "by level"),
        ("--repeats", 15, "timed calls"),
    )
    sids = benchmark(
        "sids",
        benchmark_verbs.bench_sids,
        "Vectors to codes: k-means, RQ-VAE, and faiss where it is installed (faiss-cpu).",
        "  prefixmem bench sids --vectors 1000000 --codes 2048\n"
        "  prefixmem bench sids --vectors 10000000 --width 64 --steps 0 --no-peer   # 3 GB on disk",
    )
    add_counts(
        sids,
        ("--vectors", 200_000, "random ones"),
        ("--width", 256, "numbers of a vector"),
        ("--levels", 3, "of the SIDs"),
        ("--codes", 1024, "by level; a power of two"),
        ("--iterations", 10, "of k-means"),
    )
    sids.add_argument(
        "--steps",
        type=number_from(0),
        default=1000,
        metavar="N",
        help="of RQ-VAE; 0: without (default: %(default)s)",
    )
    sids.add_argument(
        "--no-peer", action="store_true", help="without faiss, which wants all vectors in memory"
    )
    load = benchmark(
        "load",
        benchmark_verbs.bench_load,
        "Peak of host memory: a run starts from a Hugging Face checkpoint, or from its own.",
        "  prefixmem bench load --size 2GB",
    )
    load.add_argument(
        "--size", default="2GB", metavar="SIZE", help="of the checkpoint (default: %(default)s)"
    )
    pipeline = benchmark(
        "input",
        benchmark_verbs.bench_input,
        "From histories to batches: packing into files, and reading them beside a train step.",
        "  prefixmem bench input --interactions 100000000   # 2 GB on disk",
    )
    add_counts(
        pipeline,
        ("--interactions", 2_000_000, "generated ones to pack"),
        ("--shards", 16, "files"),
        ("--workers", os.cpu_count() or 1, "processes that pack"),
        ("--repeats", 30, "timed train steps"),
    )


def add_counts(to: argparse.ArgumentParser, *flags: tuple[str, int, str]) -> None:
    """Flags that take a number from 1: name, default, and what there are so many of."""
    for flag, default, what in flags:
        to.add_argument(
            flag,
            type=positive,
            default=default,
            metavar="N",
            help=f"{what} (default: %(default)s)",
        )
