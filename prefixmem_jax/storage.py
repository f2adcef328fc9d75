"""Where files lie: in folders of this machine, or in Google Cloud Storage (`gs://bucket/folder`).

A path there is an `epath.Path`, which reads, writes and lists as a `pathlib.Path` does. What the
two do differently is here: an object store has no folders that one would have to make, no renaming,
and no file that is there in part.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from prefixmem_jax.errors import UserError
from prefixmem_jax.text import shortened

SCHEME = re.compile(r"([a-zA-Z][a-zA-Z0-9+.-]+):/")


def to_path(text: str | os.PathLike[str]) -> Path:
    """A path of this machine, or `gs://...`.

    Raises:
      UserError: it names another kind of storage, or a bucket that cannot be read.
    """
    if not str(text).startswith("gs://"):
        check_local(text, "a folder or gs://")
        return Path(text)
    from etils import epath

    path = epath.Path(text)
    _check_bucket(path.parts[2] if len(path.parts) > 2 else "")
    return path


@cache
def _check_bucket(name: str) -> None:
    """Raises UserError where a bucket cannot be read; that costs one request."""
    if find_spec("gcsfs") is None:
        raise UserError(f"gs://{name}: needs gcsfs: pip install '.[gcs]'")
    import fsspec

    # Orbax writes past it: what it remembers of folders would be out of date.
    fsspec.config.conf.setdefault("gcs", {}).setdefault("use_listings_cache", False)
    try:
        fsspec.filesystem("gcs").call("GET", "b/{}/o", name, maxResults=1)
    except FileNotFoundError:
        raise UserError(f"gs://{name}: no such bucket") from None
    except Exception as error:  # of any of the libraries below: credentials, network, rights
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise UserError(f"gs://{name}: not to be read ({shortened(reason, 200)})") from None


def check_local(path: str | os.PathLike[str], expected: str = "a folder") -> None:
    """Raises UserError for `s3://...` and the like, which would become folders of these names."""
    scheme = SCHEME.match(str(path))
    if scheme:
        raise UserError(f"{path}: expected {expected}, not {scheme[1]}://; mount remote storage")


def is_remote(path: Path) -> bool:
    return not isinstance(path, Path)


def absolute(path: Path) -> Path:
    return path if is_remote(path) else path.resolve()


def exists(path: Path) -> bool:
    """Whether anything is there, a link to nothing included."""
    return path.exists() if is_remote(path) else os.path.lexists(path)


def make_folder(path: Path) -> None:
    """Makes a folder, and those around it; in an object store, a file's name makes them."""
    if not is_remote(path):
        path.mkdir(parents=True, exist_ok=True)


def walk(folder: Path) -> Iterator[tuple[Path, list[str], list[str]]]:
    """A folder and those below it, as `os.walk` gives them: names taken out are not looked into."""
    if not is_remote(folder):
        yield from ((Path(path), folders, files) for path, folders, files in os.walk(folder))
        return
    import fsspec

    found = fsspec.filesystem("gcs").ls(str(folder), detail=True)
    names = {"directory": [], "file": []}
    for one in found:
        names[one["type"]].append(one["name"].rstrip("/").rpartition("/")[2])
    yield folder, names["directory"], names["file"]
    for name in names["directory"]:
        yield from walk(folder / name)


def files_below(folder: Path) -> list[Path]:
    """All files in a folder and below it, in order."""
    return sorted(path / name for path, _, files in walk(folder) for name in files)


def move(source: Path, target: Path) -> None:
    """A file to its place, at once: renamed where that can be, else copied there and removed.

    Args:
      source: of this machine.
    """
    if is_remote(target):
        upload(source, target)
        source.unlink()
    else:
        os.replace(source, target)


def upload(source: Path, target: Path) -> None:
    """Copies a file of this machine to a remote place; it is there when it is whole."""
    import fsspec

    # A file object would be ended, and so be there, where copying to it fails half-way.
    fsspec.filesystem("gcs").put_file(str(source), str(target))


def remove_folder(path: Path) -> None:
    """A folder with all that is in it, if it is there."""
    if is_remote(path):
        path.rmtree(missing_ok=True)
    else:
        shutil.rmtree(path, ignore_errors=True)


def tensorstore_spec(folder: Path) -> dict[str, str]:
    """The key-value store that a folder is to TensorStore."""
    if is_remote(folder):
        bucket, _, path = str(folder).removeprefix("gs://").partition("/")
        return {"driver": "gcs", "bucket": bucket, "path": f"{path}/"}
    return {"driver": "file", "path": f"{folder}/"}  # no URL: a folder may be called 100%
