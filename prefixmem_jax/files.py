"""Files: sizes as users write them; nothing half-written is ever left under the final name."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np

from prefixmem_jax import storage
from prefixmem_jax.errors import UserError
from prefixmem_jax.progress import counted

# Of a folder that `replacing_files` wrote: its own files, and where new ones wait.
MANIFEST, STAGED = "prefixmem_files.json", ".prefixmem.part"

_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def parse_size(text: str, flag: str) -> int:
    """Bytes of `4GB`, `500 MB`, `2GiB`; UserError naming the flag where it is no size."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([a-zA-Z]*)", text.strip())
    if not match or match[2].upper() not in _UNITS or not float(match[1]):
        raise UserError(f"{flag} {text}: expected a size such as 4GB or 500MB")
    return int(float(match[1]) * _UNITS[match[2].upper()])


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A path of this machine to write to; moved to `path` if the block ends well, else removed."""
    with _scratch(path) as beside:
        yield beside
        storage.move(beside, path)


@contextmanager
def _scratch(path: Path) -> Iterator[Path]:
    """A file beside `path`, or where that is remote in a folder of this machine; removed after."""
    if storage.is_remote(path):
        with tempfile.TemporaryDirectory() as folder:
            yield Path(folder) / path.name
        return
    beside = path.with_name(f".{path.name}.part")
    try:
        yield beside
    finally:
        beside.unlink(missing_ok=True)


def write_npz(path: Path, arrays: Mapping[str, Any], compressed: bool = False) -> None:
    """Writes arrays by name, an .npz file."""
    with replacing(path) as beside, beside.open("wb") as file:
        (np.savez_compressed if compressed else np.savez)(file, **arrays)


@contextmanager
def reading_npz(path: Path) -> Iterator[Mapping[str, np.ndarray]]:
    """The arrays of an .npz file, read when they are asked for."""
    with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
        yield arrays


@contextmanager
def replacing_files(folder: Path, kind: str, last: str) -> Iterator[Path]:
    """An empty folder to fill. If the block ends well its files move into `folder`, else they go.

    They replace those that an earlier block of this kind left there, which a manifest lists with
    their digests. Files of somebody else stay as they are. The empty folder lies in `folder`
    itself, so that this may be a mount point or a link, and moving is renaming; only where `folder`
    is remote it lies on this machine, and moving is copying. A move that was
    killed is done again by the same command: until it has ended the manifest lists both.

    Args:
      kind: of what is written, such as `export`.
      last: the file without which nobody takes `folder` for whole; taken away first, put in last.

    Raises:
      UserError: `folder` is no place to write to, or holds something else, or one of the earlier
        files was changed since, or a file of somebody else is where one of the new ones goes.
    """
    if not storage.is_remote(folder):
        storage.check_local(folder)
    try:
        old = _own_files(folder, kind)
        with _staging(folder) as staged:
            yield staged
            _move_in(folder, staged, kind, last, old)
    except OSError as error:
        where = f" at {error.filename}" if error.filename else ""
        raise UserError(f"{folder}: {kind} failed{where}: {error.strerror or error}") from None


@contextmanager
def _staging(folder: Path) -> Iterator[Path]:
    """An empty folder in `folder`, or where that is remote on this machine; removed after."""
    if storage.is_remote(folder):
        with tempfile.TemporaryDirectory() as staged:
            yield Path(staged)
        return
    made = [path for path in (folder, *folder.parents) if not os.path.lexists(path)]
    staged = folder / STAGED
    try:
        _remove_folder(staged)
        staged.mkdir(parents=True)
        yield staged
    finally:
        storage.remove_folder(staged)
        with suppress(OSError):  # where something is in them by now
            for path in made:
                path.rmdir()


def _own_files(folder: Path, kind: str) -> dict[str, list[str]]:
    """What the manifest lists: digests that a file may have, by its path in the folder."""
    if not storage.exists(folder):
        return {}
    if not folder.exists():
        raise UserError(f"{folder}: is a link to {os.readlink(folder)}, which does not exist")
    there = set()
    if folder.is_dir():
        there = {path.name for path in folder.iterdir()} - {STAGED}
        if not there:
            return {}
    manifest = read_json_object(folder / MANIFEST) if MANIFEST in there else {}
    if manifest.get("kind") != kind:
        raise UserError(
            f"{folder}: is there already and holds something else than an older {kind}; name "
            "another folder"
        )
    files = manifest.get("files")
    if not _is_listing(files):
        raise UserError(f"{folder / MANIFEST}: expected digests by file; name another folder")
    there = [name for name in files if storage.exists(folder / name)]
    for name in counted(there, "checksums", "file"):
        path = folder / name
        if not (path.is_file() and sha256_of(path).hex() in files[name]):
            raise UserError(
                f"{path}: was changed since the {kind} that wrote it; move it away, or name "
                "another folder"
            )
    return files


def _is_listing(files: Any) -> bool:
    return isinstance(files, dict) and all(
        isinstance(digests, list) and not Path(name).is_absolute() and ".." not in Path(name).parts
        for name, digests in files.items()
    )


def _move_in(folder: Path, staged: Path, kind: str, last: str, old: dict[str, list[str]]) -> None:
    for path in _foreign(folder, staged, old):
        raise UserError(
            f"{path}: is in the way, and of no {kind}; move it away, or name another folder"
        )
    files = storage.files_below(staged)
    new = {
        str(path.relative_to(staged)): [sha256_of(path).hex()]
        for path in counted(files, "checksums", "file")
    }

    def list_files(listed: dict[str, list[str]]) -> None:
        (staged / MANIFEST).write_text(json.dumps({"kind": kind, "files": listed}, indent=2) + "\n")
        storage.move(staged / MANIFEST, folder / MANIFEST)

    list_files({name: old.get(name, []) + new.get(name, []) for name in {**old, **new}})
    (folder / last).unlink(missing_ok=True)
    for name in old.keys() - new.keys():
        (folder / name).unlink(missing_ok=True)
        _remove_empty(folder, Path(name).parent)
    for name in sorted(new, key=lambda name: name == last):
        if name == last:
            list_files(new)
        storage.make_folder((folder / name).parent)
        storage.move(staged / name, folder / name)


def _foreign(folder: Path, staged: Path, old: dict[str, list[str]]) -> Iterator[Path]:
    """What is not ours where our files go; of a subfolder of ours, everything else in it."""
    for path in staged.iterdir():
        there = folder / path.name
        if path.is_dir() and there.is_dir():
            inside = storage.files_below(there)
            yield from (file for file in inside if str(file.relative_to(folder)) not in old)
        elif storage.exists(there) and path.name not in old:
            yield there


def _remove_folder(path: Path) -> None:
    if os.path.lexists(path):
        shutil.rmtree(path)


def _remove_empty(folder: Path, inside: Path) -> None:
    """Removes a subfolder and those around it, as far as nothing is in them."""
    if storage.is_remote(folder):
        return
    with suppress(OSError):
        for path in (inside, *inside.parents)[:-1]:
            (folder / path).rmdir()


def read_json_object(path: Path) -> dict[str, Any]:
    """What a JSON file holds; UserError names the file where that is no object."""
    return _read_json(path, dict, "object")


def read_json_list(path: Path) -> list[Any]:
    """What a JSON file holds; UserError names the file where that is no list."""
    return _read_json(path, list, "list")


def _read_json(path: Path, kind: type, named: str) -> Any:
    try:
        content = json.loads(path.read_bytes().decode())
    except OSError as error:
        raise UserError(f"{path}: not readable ({error.strerror})") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not JSON ({error})") from None
    if not isinstance(content, kind):
        raise UserError(f"{path}: expected a JSON {named}, got {type(content).__name__}")
    return content


def sha256_of(path: Path) -> bytes:
    """Digest of a file of any size, read piece by piece."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").digest()


def write_text(path: Path, text: str) -> None:
    with replacing(path) as beside:
        beside.write_text(text)


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=2) + "\n")
