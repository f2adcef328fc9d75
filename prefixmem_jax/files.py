"""Writing files so that nothing half-written is ever left under the final name."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from prefixmem_jax.errors import UserError


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A path beside `path` to write to; renamed to it if the block ends well, else removed."""
    beside = path.with_name(f".{path.name}.part")
    try:
        yield beside
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


@contextmanager
def replacing_folder(path: Path, ours: str) -> Iterator[Path]:
    """A folder beside `path` to fill; takes its place if the block ends well, else is removed.

    Args:
      ours: a file that tells an older one of the same kind, which is replaced.

    Raises:
      UserError: `path` is something else that is there already.
    """
    if path.exists() and not (path / ours).is_file() and (path.is_file() or any(path.iterdir())):
        raise UserError(f"{path}: is there already and holds something else; name another folder")
    beside = path.with_name(f".{path.name}.part")
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)
    try:
        yield beside
        shutil.rmtree(path, ignore_errors=True)
        os.replace(beside, path)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def write_text(path: Path, text: str) -> None:
    with replacing(path) as beside:
        beside.write_text(text)


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=2) + "\n")
