"""Digests of checkpoint files: one flipped bit must not become part of a model unnoticed.

They stand beside the checkpoints, in `checksums/STEP.json`, written when a save has ended. A
checkpoint without one (the run was killed in that moment) is whole if Orbax finished it.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from pathlib import Path

from prefixmem_jax.files import sha256_of, write_json
from prefixmem_jax.runs.workplace import is_finished
from prefixmem_jax.storage import files_below, is_remote, make_folder

FOLDER, CHECKSUMS = "checkpoints", "checksums"


def write_checksums(run: Path, step: int) -> None:
    """Digests of a step's files; those of steps that are gone are removed.

    A remote store keeps digests of its own, and checks them.
    """
    if is_remote(run):
        return
    folder = run / FOLDER / str(step)
    make_folder(run / CHECKSUMS)
    write_json(
        run / CHECKSUMS / f"{step}.json",
        {str(path.relative_to(folder)): sha256_of(path).hex() for path in files_below(folder)},
    )
    for path in (run / CHECKSUMS).glob("*.json"):
        if not (run / FOLDER / path.stem).exists():
            path.unlink()


def find_damage(run: Path, step: int, without: Collection[str] = ()) -> str | None:
    """What is wrong with a step's files, None if nothing is.

    Args:
      without: parts that are not looked at.
    """
    folder, listed = run / FOLDER / str(step), run / CHECKSUMS / f"{step}.json"
    if not is_finished(folder):
        return "not a finished checkpoint"
    if not listed.is_file():
        return None
    try:
        expected = dict(json.loads(listed.read_text()))
    except (ValueError, TypeError):
        return None  # the list itself is damaged, and says nothing of the checkpoint
    for name, digest in expected.items():
        if name.partition("/")[0] in without:
            continue
        if not (folder / name).is_file():
            return f"{name} is missing"
        if sha256_of(folder / name).hex() != digest:
            return f"{name} has changed since it was written"
    return None
