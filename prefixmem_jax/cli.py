"""The command `prefixmem`: one verb, one function, no logic."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from prefixmem_jax.errors import UserError


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one verb; a user's mistake is one line on stderr and status 2."""
    parser = _parser()
    options, rest = parser.parse_known_args(arguments)
    # argparse gives up on overrides that stand after a flag; take them wherever they stand.
    if any(text.startswith("-") for text in rest) or (rest and "overrides" not in options):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        options.overrides = [*options.overrides, *rest]
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # it warns where there is no torch
    logging.getLogger("absl").setLevel(logging.ERROR)
    try:
        options.verb(options)
    except UserError as error:
        print(f"prefixmem: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(
            "prefixmem: interrupted; the same command goes on from the last checkpoint",
            file=sys.stderr,
        )
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="prefixmem",
        description="Train recommenders that generate Semantic IDs, with the PrefixMem encoder.",
        epilog="Start with: prefixmem quickstart",
    )
    verbs = parser.add_subparsers(required=True, metavar="VERB")

    def verb(name: str, function, summary: str, example: str) -> argparse.ArgumentParser:
        added = verbs.add_parser(
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
        _quickstart,
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
        _train,
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
        _evaluate,
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
        _recommend,
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
        _export,
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
        _import,
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
        _plan,
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
        added.set_defaults(verb=_bench, benchmark=run)
        added.add_argument("--json", type=_new_file, metavar="FILE", help="write the numbers there")
        added.add_argument(
            "--plot", type=_new_file, metavar="FILE", help="write a picture there (.png)"
        )
        return added

    memory = benchmark(
        "memory", _bench_memory, "The memory table alone: rows, optimizers, exchange."
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
    step = benchmark("step", _bench_step, "A whole train step without and with the SID encoder.")
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
        "decode", _bench_decode, "Beam search, constrained to catalogues of several sizes and not."
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
        "load", _bench_load, "Peak of host memory when a run starts from a Hugging Face checkpoint."
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


def _quickstart(options: argparse.Namespace) -> None:
    from prefixmem_jax.quickstart import quickstart

    quickstart(options.out, options.data, options.overrides, say=print)
    names = ("report.html", "results.json", "export")
    print("\n" + "  ".join(str(options.out / name) for name in names))


def _train(options: argparse.Namespace) -> None:
    from prefixmem_jax.config_files import load_config

    config = load_config(options.config, options.overrides)
    _join(options)
    from prefixmem_jax.training.loop import train

    run = Path(options.out or f"runs/{config.name}")
    if "://" in (options.out or ""):
        raise UserError(f"--out {options.out}: expected a folder; mount remote storage")
    train(config, run, profile=options.profile)
    print(f"trained {config.name} for {config.steps} steps: {run}")


def _join(options: argparse.Namespace) -> None:
    if options.distributed:
        from prefixmem_jax.parallel.mesh import initialize_processes

        initialize_processes()


def _evaluate(options: argparse.Namespace) -> None:
    _join(options)
    from prefixmem_jax.evaluation.comparison import evaluate_runs
    from prefixmem_jax.evaluation.report import comparison_table, text_table

    results, paired, levels = evaluate_runs(
        options.runs,
        options.data,
        options.split,
        options.users,
        options.beam,
        options.heuristics,
        options.out,
    )
    first = next(iter(results.values()))
    users = first[f"{options.split}_users"]
    print(
        f"retrieval on {first['retrieval_users']:,} of {users:,} {options.split} users, "
        f"beam {first['beam']}; teacher-forced accuracy on all; {first['collisions']}"
    )
    print(text_table(results, levels))
    if paired:
        print(f"\nagainst {next(iter(results))}, paired bootstrap over users, 95% interval:")
        print(comparison_table(paired, levels))
    print("  ".join(str(run / "metrics.json") for run in options.runs))


def _recommend(options: argparse.Namespace) -> None:
    from prefixmem_jax.recommender import recommend
    from prefixmem_jax.runs.run import Run
    from prefixmem_jax.semantic_ids.catalog import Catalog

    run, catalog = Run(options.run), None
    if options.catalogue is not None:
        catalog = Catalog.read_jsonl(options.catalogue, run.data_description.codebook_sizes)
    engine = run.engine(catalog)

    def answer(history: str) -> None:
        best = recommend(engine, history, options.top, options.exclude_seen)
        print("rank  log-prob  item")
        for rank, one in enumerate(best, start=1):
            sid = "-".join(map(str, one.sid))
            print(
                f"{rank:3d}  {one.score:8.3f}  item {one.item:<8d} {sid:<20s} {one.title or ''}",
                flush=True,
            )

    if options.history is not None:
        answer(options.history)
        return
    print("a history a line, item ids separated by commas:", file=sys.stderr)
    for line in filter(str.strip, sys.stdin):
        try:
            answer(line)
        except UserError as error:
            print(f"prefixmem: {error}", file=sys.stderr)


def _export(options: argparse.Namespace) -> None:
    from prefixmem_jax.convert import export_run
    from prefixmem_jax.runs.run import Run

    export_run(
        Run(options.run), options.out, options.dtype, options.max_shard_size, options.tokenizer
    )
    print(f"exported {options.run}: {options.out}")


def _import(options: argparse.Namespace) -> None:
    from prefixmem_jax.convert import import_folder

    import_folder(options.folder, options.out)
    print(f"imported {options.folder}: {options.out}")


def _plan(options: argparse.Namespace) -> None:
    from prefixmem_jax.config_files import load_config
    from prefixmem_jax.files import write_json
    from prefixmem_jax.planning.topology import use_cpu

    if options.devices and options.slices > 1:
        raise UserError("plan: --slices goes with --topology; CPU devices have none")
    config = load_config(options.config, options.overrides)
    use_cpu(options.devices or 1)
    from prefixmem_jax.planning.plan import describe, plan

    print("compiling the train step; this can take minutes ...", file=sys.stderr)
    planned = plan(config, options.topology, options.devices, options.slices)
    print(describe(planned))
    if options.json:
        write_json(options.json, planned.to_json())


def _bench(options: argparse.Namespace) -> None:
    from prefixmem_jax.benchmarks.timing import bar_plot
    from prefixmem_jax.files import write_json
    from prefixmem_jax.planning.topology import simulate_cpu_devices

    simulate_cpu_devices(8)
    module, measured = options.benchmark(options)
    print(module.describe(measured))
    if options.json:
        write_json(options.json, measured)
    if options.plot:
        bar_plot(options.plot, module.panels(measured))


def _bench_memory(options: argparse.Namespace):
    from prefixmem_jax.benchmarks import memory

    return memory, memory.bench_memory(
        options.rows, options.compared_rows, options.d_mem, options.repeats
    )


def _bench_step(options: argparse.Namespace):
    from prefixmem_jax.benchmarks import step

    return step, step.bench_step(options.decoder, options.rows, options.d_mem, options.repeats)


def _bench_decode(options: argparse.Namespace):
    from prefixmem_jax.benchmarks import decode

    return decode, decode.bench_decode(
        options.decoder,
        options.catalogues,
        options.beams,
        options.users,
        options.levels,
        options.codes,
        options.repeats,
    )


def _bench_load(options: argparse.Namespace):
    from prefixmem_jax.benchmarks import load
    from prefixmem_jax.files import parse_size

    return load, load.bench_load(parse_size(options.size, "--size"))


if __name__ == "__main__":
    sys.exit(main())
