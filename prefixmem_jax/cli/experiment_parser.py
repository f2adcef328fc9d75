"""What `prefixmem sweep` and `prefixmem paper` take."""

from __future__ import annotations

import argparse
from pathlib import Path

from prefixmem_jax.cli.arguments import local_path


def add_sweep(sweeping: argparse.ArgumentParser, config_help: str) -> None:
    sweeping.add_argument("config", metavar="CONFIG", help=config_help)
    sweeping.add_argument(
        "--out", metavar="DIR", type=local_path, help="where the runs go (default: sweeps/NAME)"
    )
    sweeping.add_argument(
        "overrides",
        nargs="+",
        metavar="KEY=VALUES",
        help="dotted config overrides; values between commas are tried one by one",
    )


def add_paper(paper: argparse.ArgumentParser, overrides_help: str) -> None:
    paper.add_argument(
        "table",
        choices=(
            "main",
            "rows",
            "initialisation",
            "tiger",
            "decoders",
            "encoders",
            "addresses",
            "levels",
            "sweep",
            "all",
            "regime",
        ),
        metavar="TABLE",
        help="main, rows (of the memory), initialisation, tiger, decoders, encoders, addresses, "
        "levels, or all of these; sweep, of the memory's sizes and rate; or regime, which trains "
        "nothing: whether the data have something for a memory to know",
    )
    paper.add_argument(
        "--scale",
        choices=("tiny", "gpu", "paper"),
        default="tiny",
        help="tiny (default), gpu, or paper, for pods: see --configs",
    )
    paper.add_argument(
        "--configs",
        action="store_true",
        help="train nothing: write a config for each row, and print the commands that train them, "
        "one at a time, wherever you like",
    )
    paper.add_argument(
        "--out",
        metavar="DIR",
        type=local_path,
        default=Path("runs/paper"),
        help="for data, runs and results, a folder for each scale (default: runs/paper)",
    )
    paper.add_argument(
        "--from",
        metavar="FILE",
        type=local_path,
        dest="result",
        help="train nothing: show this JSON of TABLE, from an earlier run; the plot goes to --out",
    )
    paper.add_argument(
        "--seeds", metavar="N", type=int, default=3, help="of every system (default: 3)"
    )
    paper.add_argument(
        "--jobs",
        metavar="N",
        type=int,
        help="runs beside each other, each on its own share of the cores (default: one a core, at "
        "most 4; with an accelerator 1)",
    )
    paper.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help=overrides_help)
