"""What the verbs take: arguments, help and examples."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from prefixmem_jax.cli import verbs
from prefixmem_jax.cli.arguments import (
    OneLineParser,
    described,
    local_path,
    new_file,
    number_from,
    positive,
)
from prefixmem_jax.cli.benchmark_parser import add_benchmarks
from prefixmem_jax.cli.data_parser import (
    add_convert,
    add_embeddings,
    add_generate,
    add_inspect,
    add_pack,
    add_raw,
    add_report,
    add_tokenizer,
)
from prefixmem_jax.cli.experiment_parser import add_paper, add_sweep
from prefixmem_jax.cli.model_parser import add_catalogue, add_evaluate, add_recommend, add_step
from prefixmem_jax.cli.run_parser import add_resume, add_runs, add_train
from prefixmem_jax.storage import to_path


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """What the command line asks for; `verb` is the function that does it."""
    parser = make_parser()
    options, rest = parser.parse_known_args(arguments)
    # argparse gives up on overrides that stand after a flag; take them wherever they stand.
    into = next((name for name in ("overrides", "given") if name in options), None)
    if any(text.startswith("-") for text in rest) or (rest and into is None):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        setattr(options, into, [*getattr(options, into), *rest])
    return options


def make_parser() -> argparse.ArgumentParser:
    parser = OneLineParser(
        prog="prefixmem",
        description="Train recommenders that generate Semantic IDs, with the PrefixMem encoder.",
        epilog="Start with: prefixmem quickstart",
    )
    parser.set_defaults(verb=lambda options: parser.print_help())
    subparsers = parser.add_subparsers(metavar="VERB")

    def verb(name: str, function, summary: str, examples: str) -> argparse.ArgumentParser:
        added = subparsers.add_parser(name, help=summary, **described(summary, examples))
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
        "  prefixmem quickstart --out X steps=100     # override a key of all runs",
    )
    quick.add_argument("--data", metavar="DIR", help="dataset folder (default: synthetic data)")
    quick.add_argument(
        "--out",
        metavar="DIR",
        type=local_path,
        default=Path("quickstart"),
        help="where results, report and runs go (default: %(default)s)",
    )
    quick.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help=overrides_help)

    starting = verb(
        "start",
        verbs.start_,
        "From raw files to recommendations: convert them, give items SIDs, train, evaluate.",
        "  prefixmem start items.csv interactions.csv --out mine\n"
        "  prefixmem start log.parquet --embeddings vectors.parquet --out mine source.item=sku\n"
        "  prefixmem start ml-32m --out mine source=movielens k_core=5 steps=500",
    )
    add_raw(starting)
    starting.add_argument(
        "--out", type=local_path, required=True, metavar="DIR", help="what is there already goes on"
    )
    add_embeddings(starting)

    data = verb(
        "data",
        lambda options: data.print_help(),
        "Bring your own data into this package's format.",
        "  prefixmem data convert items.csv interactions.csv --out DIR\n"
        "  prefixmem data inspect recommend/small data.path=DIR",
    )
    parts = data.add_subparsers(metavar="WHAT")
    add_convert(parts)
    add_generate(parts)
    add_tokenizer(parts)
    add_pack(parts, overrides_help)
    add_inspect(parts, overrides_help)
    add_report(parts, overrides_help)

    naming = verb(
        "sids",
        verbs.sids,
        "Give items Semantic IDs made of their titles or vectors, with a report of their quality.",
        "  prefixmem sids DIR --out NEW              # of the titles in DIR/items.parquet\n"
        "  prefixmem sids DIR --out NEW --embeddings FILE 'quantizer.codes=(64,64)'\n"
        "  prefixmem sids DIR --out NEW collisions=level quantizer.iterations=10\n"
        "  prefixmem sids MORE --out NEWER --apply NEW        # more items, the same codebooks",
    )
    naming.add_argument(
        "data", type=local_path, metavar="DIR", help="items.parquet, and maybe histories.parquet"
    )
    naming.add_argument(
        "--out", type=local_path, required=True, metavar="DIR", help="older SIDs there are replaced"
    )
    add_embeddings(naming)
    naming.add_argument(
        "--apply",
        type=local_path,
        metavar="OLD",
        help="what an earlier call wrote: its items keep their SIDs, new ones get theirs alike",
    )
    naming.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help=overrides_help)

    training = verb(
        "train",
        verbs.train,
        "Train one config file, or go on with its run where it was stopped.",
        "  prefixmem train quickstart/baseline                   # comes with the package\n"
        "  prefixmem train my_config.py --out runs/b2 data.path=DIR seed=1\n"
        "  prefixmem train runs/b2/config.json --out runs/b3     # a saved config runs again",
    )
    config_help = "a .py with get_config(), a .json, or the name of a config of the package"
    distributed_help = "join the other processes (see launch/)"
    add_train(training, config_help, overrides_help, distributed_help)

    resuming = verb(
        "resume",
        verbs.resume,
        "Go on with a run where it was stopped, by the config that it has.",
        "  prefixmem resume runs/b2\n"
        "  prefixmem resume runs/b2 steps=5000       # and further than was planned",
    )
    add_resume(resuming, overrides_help, distributed_help)

    listing = verb(
        "runs",
        verbs.runs,
        "List runs: which are training, done or stopped, how far, how good, and how they differ.",
        "  prefixmem runs                            # of the folder runs/\n"
        "  prefixmem runs sweeps/prefixmem quickstart --json runs.json",
    )
    add_runs(listing)

    sweeping = verb(
        "sweep",
        verbs.sweep,
        "Train a config at every combination of some keys' values, one run after the other; runs "
        "that are done already are not trained again.",
        "  prefixmem sweep quickstart/baseline optimizer.learning_rate=1e-3,3e-3,1e-2\n"
        "  prefixmem sweep recommend/small data.path=DIR seed=0,1,2 model.dropout=0.2,0.4\n"
        "  prefixmem sweep recommend/small 'sid_encoder.target_levels=(1,3,4),(3,4)'",
    )
    add_sweep(sweeping, config_help)

    paper = verb(
        "paper",
        verbs.paper,
        "Train and evaluate the systems of a table of the paper, at the same learning rates and "
        "several seeds, and print ours beside the paper's numbers; runs that are done already are "
        "not trained again.",
        "  prefixmem paper main                           # minutes a run on two CPU cores\n"
        "  prefixmem paper all --scale gpu --out DIR\n"
        "  prefixmem paper main --from configs/paper/results/tiny_main.json   # trains nothing\n"
        "  prefixmem paper main --out DIR data.path=DATA data.codebook_sizes=none   # your data\n"
        "  prefixmem paper regime data.path=DATA data.codebook_sizes=none   # is it worth that?",
    )
    add_paper(paper, overrides_help)

    evaluation = verb(
        "evaluate",
        verbs.evaluate,
        "Evaluate runs side by side, on the same users; writes each RUN/metrics.json and "
        "scores.npz, tables and plots.",
        "  prefixmem evaluate quickstart/prefixmem\n"
        "  prefixmem evaluate quickstart/baseline quickstart/prefixmem --beam 100 --heuristics\n"
        "  prefixmem evaluate runs/b2 --data DIR --split validation --users 1000\n"
        "  prefixmem evaluate runs/b2 --step best        # not the newest checkpoint",
    )
    add_evaluate(evaluation, distributed_help)

    recommend = verb(
        "recommend",
        verbs.recommend,
        "Recommend items after a history, best first, with titles and scores.",
        "  prefixmem recommend quickstart/prefixmem --history 12,55,803\n"
        "  prefixmem recommend quickstart/prefixmem      # a history a line, until end of input\n"
        "  prefixmem recommend RUN --histories users.parquet --out best.parquet   # all users\n"
        "  prefixmem recommend runs/b2 --history 12 --top 5 --beam 100\n"
        "  prefixmem recommend runs/b2 --data DIR                  # its data lie there now\n"
        "  prefixmem recommend runs/b2 --data exported/items.jsonl # or its catalogue alone",
    )
    add_recommend(recommend, distributed_help)

    exporting = verb(
        "export",
        verbs.export,
        "Write a run's model as a Hugging Face folder that needs nothing of ours.",
        "  prefixmem export quickstart/prefixmem --out exported\n"
        "  prefixmem export runs/b2 --out exported --dtype bfloat16 --max-shard-size 2GB",
    )
    exporting.add_argument("run", metavar="RUN", help="a run directory")
    exporting.add_argument(
        "--out",
        type=to_path,
        required=True,
        metavar="DIR",
        help="an older export there is replaced; also gs://BUCKET/DIR or s3://",
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
    add_catalogue(exporting)
    add_step(exporting)
    exporting.add_argument("--distributed", action="store_true", help=distributed_help)

    importing = verb(
        "import",
        verbs.import_,
        "Turn a Hugging Face folder into an Orbax checkpoint, once, for init.from_huggingface.",
        "  prefixmem import Qwen3-1.7B --out qwen3_1p7b\n"
        "  prefixmem train CONFIG init.from_huggingface=qwen3_1p7b",
    )
    importing.add_argument(
        "folder", type=local_path, metavar="DIR", help="a Hugging Face model folder"
    )
    importing.add_argument(
        "--out",
        type=local_path,
        required=True,
        metavar="CKPT",
        help="an older import there is replaced",
    )

    planning = verb(
        "plan",
        verbs.plan,
        "Compile a config's train step, or its search, for a TPU pod that you do not have yet: "
        "memory, FLOPs, network traffic and what bounds the step, per chip.",
        "  prefixmem plan qwen3_1p7b/prefixmem --topology v5e:4x4\n"
        "  prefixmem plan qwen3_1p7b/prefixmem --topology v5e:16x16 data.batch_size=1024\n"
        "  prefixmem plan qwen3_1p7b/prefixmem --topology v5e:2x4 --verb recommend \\\n"
        "    evaluation.batch_size=1024\n"
        "  prefixmem plan quickstart/baseline --devices 8 --json plan.json",
    )
    planning.add_argument("config", metavar="CONFIG", help=config_help)
    planning.add_argument(
        "--verb",
        dest="planned",
        choices=("train", "recommend"),
        default="train",
        help="a train step, or a search for evaluation.batch_size users (default: train)",
    )
    where = planning.add_mutually_exclusive_group(required=True)
    where.add_argument(
        "--topology", metavar="POD", help="such as v5e:16x16, v6e:8x8, v5p:4x4x8 (extra [tpu])"
    )
    where.add_argument(
        "--devices", type=number_from(1, 1024), metavar="N", help="simulated CPU devices"
    )
    planning.add_argument(
        "--slices", type=positive, default=1, metavar="N", help="pods of that shape (default: 1)"
    )
    planning.add_argument("--json", type=new_file, metavar="FILE", help="also write the plan there")
    planning.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help=overrides_help)

    benching = verb(
        "bench",
        lambda options: benching.print_help(),
        "Measure on this machine what the parts of this package cost.",
        "  prefixmem bench memory --json memory.json --plot memory.png\n"
        "  prefixmem bench step --decoder qwen3-0.6b --rows 5000000 --d-mem 256 --peer # on a GPU\n"
        "  prefixmem bench load --size 2GB",
    )
    add_benchmarks(benching.add_subparsers(metavar="WHAT"))
    return parser
