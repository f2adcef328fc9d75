"""The command `prefixmem`: one verb, one function, no logic."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Sequence

from prefixmem_jax.cli.parser import make_parser
from prefixmem_jax.errors import UserError


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one verb; a user's mistake is one line on stderr and status 2."""
    parser = make_parser()
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
