"""Files: sizes as users write them; nothing half-written is ever left under the final name."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from prefixmem_jax.errors import UserError

_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def parse_size(text: str, flag: str) -> int:
    """Bytes of `4GB`, `500 MB`, `2GiB`; UserError naming the flag where it is no size."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([a-zA-Z]*)", text.strip())
    if not match or match[2].upper() not in _UNITS or not float(match[1]):
        raise UserError(f"{flag} {text}: expected a size such as 4GB or 500MB")
    return int(float(match[1]) * _UNITS[match[2].upper()])


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
def replacing_folder(path: Path, is_older: Callable[[Path], bool]) -> Iterator[Path]:
    """A folder beside `path` to fill; takes its place if the block ends well, else is removed.

    Args:
      is_older: whether a folder is an older one of the same kind, which may be replaced.

    Raises:
      UserError: `path` is something else that is there already.
    """
    if path.exists() and (path.is_file() or (any(path.iterdir()) and not is_older(path))):
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


def sha256_of(path: Path) -> bytes:
    """Digest of a file of any size, read piece by piece."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").digest()


def write_text(path: Path, text: str) -> None:
    with replacing(path) as beside:
        beside.write_text(text)


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=2) + "\n")
