"""What the verbs take that read a trained run: `prefixmem evaluate`, `recommend`, `export`."""

from __future__ import annotations

import argparse

from prefixmem_jax.cli.arguments import number_from, positive, step
from prefixmem_jax.storage import to_path


def add_evaluate(evaluation: argparse.ArgumentParser, distributed_help: str) -> None:
    evaluation.add_argument(
        "runs",
        metavar="RUN",
        nargs="+",
        type=to_path,
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
        "--heuristics",
        action="store_true",
        help="popularity, successor, transition and item-kNN too",
    )
    evaluation.add_argument(
        "--out",
        type=to_path,
        metavar="DIR",
        help="for results.json and plots (default: the run; comparison/ for several runs)",
    )
    evaluation.add_argument(
        "--users",
        type=number_from(0),
        metavar="N",
        help="test users for retrieval, 0 for all (default: the config's)",
    )
    evaluation.add_argument(
        "--beam", type=positive, metavar="N", help="beam width (default: the config's)"
    )
    _add_include_seen(evaluation)
    evaluation.add_argument(
        "--item-share",
        type=float,
        metavar="SHARE",
        help="of the item head in a SID's score, 0 to 1 (default: the config's)",
    )
    evaluation.add_argument(
        "--transition-share",
        type=float,
        metavar="SHARE",
        help="of what stood next to what in training in a SID's probability, 0 to below 1 "
        "(default: the config's)",
    )
    evaluation.add_argument(
        "--blend",
        type=float,
        nargs="+",
        default=(),
        metavar="SHARE",
        help="of two runs: also blends of their lists, with this share of the second's",
    )
    add_step(evaluation)
    evaluation.add_argument("--distributed", action="store_true", help=distributed_help)


def add_recommend(recommend: argparse.ArgumentParser, distributed_help: str) -> None:
    recommend.add_argument("run", metavar="RUN", help="a run directory")
    whom = recommend.add_mutually_exclusive_group()
    whom.add_argument(
        "--history",
        metavar="ID,ID,...",
        help="item ids, oldest first (default: read one line after the other, answer each)",
    )
    whom.add_argument(
        "--histories",
        type=to_path,
        metavar="FILE",
        help="Parquet with user_id and item_ids (lists of items' keys as text, or of numbers)",
    )
    recommend.add_argument(
        "--out",
        type=to_path,
        metavar="FILE",
        help="Parquet for the recommendations to the users of --histories; a call that was killed "
        "goes on where it was",
    )
    add_catalogue(recommend)
    _add_include_seen(recommend)
    recommend.add_argument(
        "--top",
        type=positive,
        default=10,
        metavar="N",
        help="items to show (default: %(default)s)",
    )
    recommend.add_argument(
        "--beam",
        type=positive,
        metavar="N",
        help="beam width, at least --top (default: the config's)",
    )
    add_step(recommend)
    recommend.add_argument("--distributed", action="store_true", help=distributed_help)


def add_catalogue(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--data",
        metavar="PATH",
        help="the same items elsewhere: a dataset folder, or items.jsonl of an export "
        "(default: the run's own)",
    )


def _add_include_seen(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--include-seen",
        action="store_true",
        help="recommend what the history holds too, where the run has counted transitions as often "
        "as training histories came back to an item (default: leave it out)",
    )


def add_step(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--step",
        type=step,
        metavar="N",
        help="of the checkpoint to read, or `best` (default: by evaluation.select_by, else newest)",
    )
