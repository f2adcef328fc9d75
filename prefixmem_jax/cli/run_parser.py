"""What `prefixmem train`, `resume` and `runs` take."""

from __future__ import annotations

import argparse
from pathlib import Path

from prefixmem_jax.cli.arguments import first_and_last, new_file
from prefixmem_jax.storage import to_path


def add_train(
    training: argparse.ArgumentParser, config_help: str, overrides_help: str, distributed_help: str
) -> None:
    training.add_argument("config", metavar="CONFIG", help=config_help)
    training.add_argument(
        "--out",
        metavar="DIR",
        help="run directory, also gs://BUCKET/RUN or s3:// (default: runs/NAME, the config's name)",
    )
    training.add_argument(
        "--profile",
        type=first_and_last,
        metavar="FIRST:LAST",
        help="trace the steps after FIRST up to LAST into the run's profile/ (xprof)",
    )
    training.add_argument("--distributed", action="store_true", help=distributed_help)
    training.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help=overrides_help)


def add_resume(
    resuming: argparse.ArgumentParser, overrides_help: str, distributed_help: str
) -> None:
    resuming.add_argument("run", type=to_path, metavar="RUN", help="a run directory")
    resuming.add_argument("--distributed", action="store_true", help=distributed_help)
    resuming.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help=overrides_help)


def add_runs(listing: argparse.ArgumentParser) -> None:
    listing.add_argument(
        "folders",
        nargs="*",
        type=to_path,
        default=[Path("runs")],
        metavar="DIR",
        help="where to look, folders below included (default: runs)",
    )
    listing.add_argument("--json", type=new_file, metavar="FILE", help="also write the list there")
