"""What the verbs take: arguments, help and examples."""

from __future__ import annotations

import argparse
from pathlib import Path

from prefixmem_jax.cli import verbs


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="prefixmem",
        description="Train recommenders that generate Semantic IDs, with the PrefixMem encoder.",
        epilog="Start with: prefixmem quickstart",
    )
    subparsers = parser.add_subparsers(required=True, metavar="VERB")

    def verb(name: str, function, summary: str, example: str) -> argparse.ArgumentParser:
        added = subparsers.add_parser(
            name,
            help=summary,
            description=summary,
            epilog=f"examples:\n{example}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        added.set_defaults(verb=function)
        return added

    overrides_help = "dotted config overrides, such as optimizer.learning_rate=3e-4 steps=500"

    quick = verb(
        "quickstart",
        verbs.quickstart,
        "Train a small decoder without and with PrefixMem, compare them, and export the latter to "
        "Hugging Face format.",
        "  prefixmem quickstart                       # synthetic data, known optimum\n"
        "  prefixmem quickstart --data DIR --out X    # your items.parquet and histories.parquet\n"
        "  prefixmem quickstart --out X steps=100     # override a key of all three runs",
    )
    quick.add_argument("--data", metavar="DIR", help="dataset folder (default: synthetic data)")
    quick.add_argument(
        "--out",
        metavar="DIR",
        type=Path,
        default=Path("quickstart"),
        help="where results, report and runs go (default: %(default)s)",
    )
    quick.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help=overrides_help)

    training = verb(
        "train",
        verbs.train,
        "Train one config file, or go on with its run where it was stopped.",
        "  prefixmem train configs/quickstart/baseline.py\n"
        "  prefixmem train configs/quickstart/baseline.py --out runs/b2 data.path=DIR seed=1\n"
        "  prefixmem train runs/b2/config.json --out runs/b3     # a saved config runs again",
    )
    training.add_argument("config", metavar="CONFIG", help="a .py with get_config(), or a .json")
    training.add_argument(
        "--out",
        metavar="DIR",
        help="run directory (default: runs/NAME, the config's name)",
    )
    training.add_argument(
        "--profile",
        type=_steps,
        metavar="FIRST:LAST",
        help="trace the steps after FIRST up to LAST into the run's profile/ (xprof)",
    )
    distributed_help = "join the other processes (see launch/)"
    training.add_argument("--distributed", action="store_true", help=distributed_help)
    training.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help=overrides_help)

    evaluation = verb(
        "evaluate",
        verbs.evaluate,
        "Evaluate runs' newest checkpoints side by side; writes each RUN/metrics.json and "
        "scores.npz, tables and plots.",
        "  prefixmem evaluate quickstart/prefixmem\n"
        "  prefixmem evaluate quickstart/baseline quickstart/prefixmem --beam 100 --heuristics\n"
        "  prefixmem evaluate runs/b2 --data DIR --split validation --users 1000",
    )
    evaluation.add_argument(
        "runs",
        metavar="RUN",
        nargs="+",
        type=Path,
        help="run directories; the first is compared with",
    )
    evaluation.add_argument(
        "--data", metavar="DIR", help="dataset folder (default: each run's own)"
    )
    evaluation.add_argument(
        "--split",
        choices=("test", "validation"),
        default="test",
        help="users to evaluate on (default: %(default)s)",
    )
    evaluation.add_argument(
        "--heuristics", action="store_true", help="popularity, successor and item-kNN too"
    )
    evaluation.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        help="for results.json and plots (default: the run; comparison/ for several runs)",
    )
    evaluation.add_argument(
        "--users",
        type=int,
        metavar="N",
        help="test users for retrieval, 0 for all (default: the config's)",
    )
    evaluation.add_argument(
        "--beam", type=int, metavar="N", help="beam width (default: the config's)"
    )
    evaluation.add_argument("--distributed", action="store_true", help=distributed_help)

    recommend = verb(
        "recommend",
        verbs.recommend,
        "Recommend items after a history, best first, with titles and scores.",
        "  prefixmem recommend quickstart/prefixmem --history 12,55,803\n"
        "  prefixmem recommend quickstart/prefixmem      # a history a line, until end of input\n"
        "  prefixmem recommend runs/b2 --history 12 --top 5\n"
        "  prefixmem recommend runs/b2 --catalogue exported/items.jsonl   # without its data",
    )
    recommend.add_argument("run", metavar="RUN", help="a run directory")
    recommend.add_argument(
        "--history",
        metavar="ID,ID,...",
        help="item ids, oldest first (default: read one line after the other, answer each)",
    )
    recommend.add_argument(
        "--catalogue",
        metavar="FILE",
        help="items.jsonl of an export of the run (default: the items of the run's data)",
    )
    recommend.add_argument(
        "--exclude-seen", action="store_true", help="leave out the history's items"
    )
    recommend.add_argument(
        "--top", type=int, default=10, metavar="N", help="items to show (default: %(default)s)"
    )

    exporting = verb(
        "export",
        verbs.export,
        "Write a run's newest checkpoint as a Hugging Face folder that needs nothing of ours.",
        "  prefixmem export quickstart/prefixmem --out exported\n"
        "  prefixmem export runs/b2 --out exported --dtype bfloat16 --max-shard-size 2GB",
    )
    exporting.add_argument("run", metavar="RUN", help="a run directory")
    exporting.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="an older export there is replaced"
    )
    exporting.add_argument(
        "--dtype",
        choices=("float32", "bfloat16"),
        help="of all weights (default: each as it was trained)",
    )
    exporting.add_argument(
        "--max-shard-size",
        default="4GB",
        metavar="SIZE",
        help="largest safetensors file, such as 500MB or 2GiB (default: %(default)s)",
    )
    exporting.add_argument(
        "--tokenizer",
        metavar="DIR",
        help="folder of the text tokenizer (default: that of the model the run started from)",
    )

    importing = verb(
        "import",
        verbs.import_,
        "Turn a Hugging Face folder into an Orbax checkpoint, once, for init.from_huggingface.",
        "  prefixmem import Qwen3-1.7B --out qwen3_1p7b\n"
        "  prefixmem train CONFIG init.from_huggingface=qwen3_1p7b",
    )
    importing.add_argument("folder", type=Path, metavar="DIR", help="a Hugging Face model folder")
    importing.add_argument(
        "--out", type=Path, required=True, metavar="CKPT", help="an older import there is replaced"
    )

    planning = verb(
        "plan",
        verbs.plan,
        "Compile a config's train step for a TPU pod that you do not have yet: memory, FLOPs, "
        "network traffic and what bounds the step, per chip.",
        "  prefixmem plan configs/qwen3_1p7b/prefixmem.py --topology v5e:4x4\n"
        "  prefixmem plan configs/qwen3_1p7b/prefixmem.py --topology v5e:16x16 "
        "data.batch_size=1024\n"
        "  prefixmem plan configs/quickstart/baseline.py --devices 8 --json plan.json",
    )
    planning.add_argument("config", metavar="CONFIG", help="a .py with get_config(), or a .json")
    where = planning.add_mutually_exclusive_group(required=True)
    where.add_argument(
        "--topology", metavar="POD", help="such as v5e:16x16, v6e:8x8, v5p:4x4x8 (extra [tpu])"
    )
    where.add_argument("--devices", type=_positive, metavar="N", help="simulated CPU devices")
    planning.add_argument(
        "--slices", type=_positive, default=1, metavar="N", help="pods of that shape (default: 1)"
    )
    planning.add_argument(
        "--json", type=_new_file, metavar="FILE", help="also write the plan there"
    )
    planning.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help=overrides_help)

    benching = verb(
        "bench",
        None,
        "Measure on this machine what the parts of this package cost.",
        "  prefixmem bench memory --json memory.json --plot memory.png\n"
        "  prefixmem bench step --decoder qwen3-0.6b --rows 5000000 --d-mem 256   # on a GPU\n"
        "  prefixmem bench load --size 2GB",
    )
    _add_benchmarks(benching.add_subparsers(required=True, metavar="WHAT"))
    return parser


def _add_benchmarks(benchmarks: argparse._SubParsersAction) -> None:
    def benchmark(name: str, run, summary: str) -> argparse.ArgumentParser:
        added = benchmarks.add_parser(name, help=summary, description=summary)
        added.set_defaults(verb=verbs.bench, benchmark=run)
        added.add_argument("--json", type=_new_file, metavar="FILE", help="write the numbers there")
        added.add_argument(
            "--plot", type=_new_file, metavar="FILE", help="write a picture there (.png)"
        )
        return added

    memory = benchmark(
        "memory", verbs.bench_memory, "The memory table alone: rows, optimizers, exchange."
    )
    memory.add_argument(
        "--rows",
        type=_positive,
        nargs="+",
        default=[2**14, 2**17, 2**20],
        metavar="T",
        help="rows per table (default: 16384 131072 1048576)",
    )
    memory.add_argument(
        "--compared-rows",
        type=_positive,
        default=500_000,
        metavar="T",
        help="rows per table where dense AdamW is compared (default: %(default)s)",
    )
    step = benchmark(
        "step", verbs.bench_step, "A whole train step without and with the SID encoder."
    )
    step.add_argument(
        "--rows", type=_positive, default=500_000, metavar="T", help="rows per table (%(default)s)"
    )
    step.add_argument(
        "--decoder",
        choices=("quickstart", "qwen3-0.6b"),
        default="quickstart",
        help="whose shape (default: %(default)s)",
    )
    for added in (memory, step):
        added.add_argument(
            "--d-mem", type=_positive, default=64, metavar="N", help="memory width (default: 64)"
        )
        added.add_argument(
            "--repeats", type=_positive, default=30, metavar="N", help="timed calls (default: 30)"
        )
    decode = benchmark(
        "decode",
        verbs.bench_decode,
        "Beam search, constrained to catalogues of several sizes and not.",
    )
    decode.add_argument(
        "--decoder",
        choices=("4-layer", "quickstart", "qwen3-0.6b"),
        default="4-layer",
        help="whose shape (default: %(default)s, d_model 256)",
    )
    for flag, default, what in (
        ("--catalogues", [10_000, 1_000_000, 10_000_000], "random SIDs to constrain to"),
        ("--beams", [10, 70, 500], "widths of the beam"),
    ):
        decode.add_argument(
            flag,
            type=_positive,
            nargs="+",
            default=default,
            metavar="N",
            help=f"{what} (default: {' '.join(map(str, default))})",
        )
    for flag, default, what in (
        ("--users", 2, "in one batch"),
        ("--levels", 5, "of the SIDs"),
        ("--codes", 2048, "by level"),
        ("--repeats", 15, "timed calls"),
    ):
        decode.add_argument(
            flag,
            type=_positive,
            default=default,
            metavar="N",
            help=f"{what} (default: %(default)s)",
        )
    load = benchmark(
        "load",
        verbs.bench_load,
        "Peak of host memory when a run starts from a Hugging Face checkpoint.",
    )
    load.add_argument(
        "--size", default="2GB", metavar="SIZE", help="of the checkpoint (default: %(default)s)"
    )


def _new_file(text: str) -> Path:
    path = Path(text)
    if not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"no such folder: {path.parent}")
    return path


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected 1 or more, got {text}")
    return value


def _steps(text: str) -> tuple[int, int]:
    first, _, last = text.partition(":")
    if not (first.isdecimal() and last.isdecimal() and 0 < int(first) < int(last)):
        raise argparse.ArgumentTypeError(f"expected FIRST:LAST, such as 100:110, got {text}")
    return int(first), int(last)
