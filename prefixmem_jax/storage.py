"""Where files lie: in folders of this machine, or in an object store (`gs://bucket/folder`, `s3://`).

A path there is an `epath.Path`, which reads, writes and lists as a `pathlib.Path` does. What the
two do differently is here: an object store has no folders that one would have to make, no renaming,
and no file that is there in part.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from prefixmem_jax.errors import UserError
from prefixmem_jax.text import shortened

SCHEME = re.compile(r"([a-zA-Z][a-zA-Z0-9+.-]+):/")


@dataclass(frozen=True)
class Store:
    """A kind of object store.

    Attributes:
      protocol: its name in fsspec.
      package, extra: what that needs, and what of ours installs it.
      look: asks for something in a bucket, by one request.
      streams: whether Orbax writes there; else checkpoints go by a folder of this machine.
    """

    protocol: str
    package: str
    extra: str
    look: Callable[[Any, str], object]
    streams: bool


STORES = {
    "gs": Store(
        "gcs", "gcsfs", "gcs",
        lambda files, name: files.call("GET", "b/{}/o", name, maxResults=1),
        streams=True,
    ),
    "s3": Store(
        "s3", "s3fs", "s3",
        lambda files, name: files.call_s3("list_objects_v2", Bucket=name, MaxKeys=1),
        streams=False,
    ),
}  # fmt: skip


def _scheme(path: str | os.PathLike[str]) -> str | None:
    """`gs` or `s3` of a path there, None of any other."""
    scheme, separator, _ = str(path).partition("://")
    return scheme if separator and scheme in STORES else None


def to_path(text: str | os.PathLike[str]) -> Path:
    """A path of this machine, or `gs://...`, or `s3://...`.

    Raises:
      UserError: it names another kind of storage, or a bucket that cannot be read.
    """
    scheme = _scheme(text)
    if scheme is None:
        check_local(text, "a folder, gs:// or s3://")
        return Path(text)
    from etils import epath

    path = epath.Path(text)
    _check_bucket(scheme, path.parts[2] if len(path.parts) > 2 else "")
    return path


@cache
def _check_bucket(scheme: str, name: str) -> None:
    """Raises UserError where a bucket cannot be read; that costs one request."""
    store, where = STORES[scheme], f"{scheme}://{name}"
    if find_spec(store.package) is None:
        raise UserError(f"{where}: needs {store.package}: pip install '.[{store.extra}]'")
    import fsspec

    # Orbax writes past it: what it remembers of folders would be out of date.
    fsspec.config.conf.setdefault(store.protocol, {}).setdefault("use_listings_cache", False)
    try:
        store.look(fsspec.filesystem(store.protocol), name)
    except FileNotFoundError:
        raise UserError(f"{where}: no such bucket") from None
    except Exception as error:  # of any of the libraries below: credentials, network, rights
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise UserError(f"{where}: not to be read ({shortened(reason, 200)})") from None


def check_local(path: str | os.PathLike[str], expected: str = "a folder") -> None:
    """Raises UserError for `ftp://...` and the like, which would become folders of these names."""
    scheme = SCHEME.match(str(path))
    if scheme:
        raise UserError(f"{path}: expected {expected}, not {scheme[1]}://; mount remote storage")


def _files(path: Path) -> Any:
    """The fsspec file system that a remote path lies in."""
    import fsspec

    return fsspec.filesystem(STORES[_scheme(path)].protocol)


def orbax_writes(path: Path) -> bool:
    """Whether Orbax can keep checkpoints there."""
    return not is_remote(path) or STORES[_scheme(path)].streams


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
    found = _files(folder).ls(str(folder), detail=True)
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
    # A file object would be ended, and so be there, where copying to it fails half-way.
    _files(target).put_file(str(source), str(target))


def upload_all(folder: Path, names: Sequence[str], target: Path) -> None:
    """Copies files of a folder of this machine to a remote one, several at a time."""
    if names:
        sources, targets = ([f"{place}/{name}" for name in names] for place in (folder, target))
        _files(target).put(sources, targets)


def download_all(source: Path, names: Sequence[str], folder: Path) -> None:
    """Copies files of a remote folder to one of this machine, several at a time."""
    if names:
        sources, targets = ([f"{place}/{name}" for name in names] for place in (source, folder))
        _files(source).get(sources, targets)


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
