"""Safetensors folders: one file or several with an index, read and written a piece at a time."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from prefixmem_jax.errors import UserError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"

_DTYPES = {np.dtype(np.float32): "F32", np.dtype(ml_dtypes.bfloat16): "BF16"}


class SafetensorsFolder:
    """The tensors of a folder; a read opens and closes its file: no page stays mapped."""

    def __init__(self, folder: str | Path):
        folder = Path(folder)
        if (folder / INDEX).is_file():
            try:
                files = json.loads((folder / INDEX).read_text())["weight_map"]
            except (json.JSONDecodeError, KeyError, TypeError) as error:
                raise UserError(
                    f"{folder / INDEX}: expected JSON with a weight_map ({error})"
                ) from None
        elif (folder / SINGLE).is_file():
            files = dict.fromkeys(self._names(folder / SINGLE), SINGLE)
        else:
            raise UserError(f"{folder}: no {SINGLE} and no {INDEX}")
        self.folder = folder
        self.files: dict[str, str] = files
        for name in sorted(set(files.values())):
            if not (folder / name).is_file():
                raise UserError(f"{folder}: {name} is missing, which {INDEX} names")
            self._names(folder / name)  # that it can be read

    @staticmethod
    def _names(path: Path) -> list[str]:
        try:
            with safe_open(path, framework="np") as file:
                return list(file.keys())
        except SafetensorError as error:
            raise UserError(f"{path}: not a safetensors file ({error})") from None

    def shape(self, name: str) -> tuple[int, ...]:
        with safe_open(self.folder / self.files[name], framework="np") as file:
            return tuple(file.get_slice(name).get_shape())

    def read(self, name: str, rows: slice = slice(None)) -> np.ndarray:
        """A tensor, or some of its rows."""
        with safe_open(self.folder / self.files[name], framework="np") as file:
            return file.get_slice(name)[rows]


class SafetensorsWriter:
    """Lays tensors out in files whose bytes are filled in afterwards, in any order and in pieces.

    The safetensors library writes a file from tensors that are all in memory; a memory table of
    tens of gigabytes need not be. The format (a JSON header, then the bytes) is written here and
    read back by the library in the tests.
    """

    def __init__(
        self,
        folder: Path,
        tensors: Mapping[str, tuple[tuple[int, ...], np.dtype]],
        max_shard_bytes: int,
    ):
        """Writes headers and index; the tensors are zeros until they are filled.

        Args:
          tensors: shape and dtype (float32 or bfloat16) by name. A tensor larger than
            `max_shard_bytes` has a file of its own.
        """
        sizes = {n: math.prod(shape) * dtype.itemsize for n, (shape, dtype) in tensors.items()}
        shards: list[list[str]] = []
        room = 0
        for name, size in sizes.items():
            if not shards or size > room:
                shards.append([])
                room = max_shard_bytes
            shards[-1].append(name)
            room -= size
        count = len(shards)
        self._tensors = dict(tensors)
        self._at: dict[str, tuple[Path, int]] = {}
        for number, names in enumerate(shards, start=1):
            file = SINGLE if count == 1 else f"model-{number:05d}-of-{count:05d}.safetensors"
            self._lay_out(folder / file, names, sizes)
        if count > 1:
            index = {
                "metadata": {"total_size": sum(sizes.values())},
                "weight_map": {name: path.name for name, (path, _) in self._at.items()},
            }
            (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")

    def _lay_out(self, path: Path, names: list[str], sizes: Mapping[str, int]) -> None:
        # Wide numbers first, so that every tensor is aligned.
        names = sorted(names, key=lambda name: -self._tensors[name][1].itemsize)
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        offsets, end = {}, 0
        for name in names:
            shape, dtype = self._tensors[name]
            offsets[name] = end
            end += sizes[name]
            header[name] = {
                "dtype": _DTYPES[dtype],
                "shape": list(shape),
                "data_offsets": [offsets[name], end],
            }
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        with path.open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            file.truncate(8 + len(text) + end)
        for name, offset in offsets.items():
            self._at[name] = (path, 8 + len(text) + offset)

    def tensor(self, name: str) -> np.ndarray:
        """The tensor's place in its file, to assign to; written when the array is let go."""
        path, offset = self._at[name]
        shape, dtype = self._tensors[name]
        return np.memmap(path, dtype=dtype, mode="r+", offset=offset, shape=shape)
