"""How single arguments are read, and how mistakes in them are told."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from prefixmem_jax.storage import check_local
from prefixmem_jax.text import shortened, visible


class OneLineParser(argparse.ArgumentParser):
    """Mistakes are one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {visible(message)}; see {self.prog} --help\n")


def new_file(text: str) -> Path:
    path = Path(text)
    if not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"no such folder: {path.parent}")
    return path


def local_path(text: str) -> Path:
    check_local(text)
    return Path(text)


def number_from(least: int, most: int | None = None) -> Callable[[str], int]:
    """Reads whole numbers in a range."""

    def read(text: str) -> int:
        try:
            value = int(text)
        except ValueError:  # thousands of digits, too
            value = None
        if value is None or value < least or (most is not None and value > most):
            upto = "or more" if most is None else f"to {most}"
            raise argparse.ArgumentTypeError(f"expected {least} {upto}, got {shortened(text, 30)}")
        return value

    return read


positive = number_from(1)


def step(text: str) -> int | str:
    return text if text == "best" else number_from(0)(text)


def first_and_last(text: str) -> tuple[int, int]:
    first, _, last = text.partition(":")
    if not (first.isdecimal() and last.isdecimal() and 0 < int(first) < int(last)):
        raise argparse.ArgumentTypeError(f"expected FIRST:LAST, such as 100:110, got {text}")
    return int(first), int(last)


def described(summary: str, examples: str) -> dict[str, Any]:
    """How --help begins and ends."""
    return {
        "description": summary,
        "epilog": f"examples:\n{examples}",
        "formatter_class": argparse.RawDescriptionHelpFormatter,
    }
