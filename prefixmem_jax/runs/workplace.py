"""Where Orbax works on a run's checkpoints: in their folder, or in a copy where it cannot write."""

from __future__ import annotations

import tempfile
from pathlib import Path

import orbax.checkpoint.experimental.v1 as ocp

from prefixmem_jax.storage import (
    absolute,
    download_all,
    files_below,
    orbax_writes,
    remove_folder,
    upload_all,
)

# Copied last: without it a folder there is no checkpoint.
_LAST = "_CHECKPOINT_METADATA"


def is_finished(checkpoint: Path) -> bool:
    """Whether a step's folder holds a whole checkpoint, as far as its writer says so."""
    if orbax_writes(checkpoint):
        return ocp.is_orbax_checkpoint(checkpoint)
    return (checkpoint / _LAST).is_file()


class InPlace:
    """Their own folder."""

    def __init__(self, folder: Path):
        self.folder = absolute(folder)

    def bring(self, step: int) -> None:
        """Sees that a step's checkpoint is in `folder`."""

    def publish(self, step: int) -> None:
        """Brings a step's checkpoint to where it is kept."""

    def close(self) -> None:
        """Ends the work."""


class LocalCopy(InPlace):
    """A temporary folder of this machine, for a remote one that Orbax does not write to."""

    def __init__(self, remote: Path):
        self._remote = remote
        self._temporary = tempfile.TemporaryDirectory(prefix="prefixmem-checkpoints-")
        self.folder = Path(self._temporary.name)

    def bring(self, step: int) -> None:
        there, here = self._remote / str(step), self.folder / str(step)
        if here.exists():
            return
        names = [str(path.relative_to(there)) for path in files_below(there)]
        for name in names:
            (here / name).parent.mkdir(parents=True, exist_ok=True)
        download_all(there, names, here)

    def publish(self, step: int) -> None:
        """Copies it there, and removes there what is no more here."""
        there, here = self._remote / str(step), self.folder / str(step)
        remove_folder(there)  # what is there of a copy that was cut off
        names = [str(path.relative_to(here)) for path in files_below(here)]
        upload_all(here, [name for name in names if name != _LAST], there)
        upload_all(here, [_LAST], there)
        for path in self._remote.iterdir():
            if not (self.folder / path.name).exists():
                (path / _LAST).unlink(missing_ok=True)
                remove_folder(path)

    def close(self) -> None:
        self._temporary.cleanup()
