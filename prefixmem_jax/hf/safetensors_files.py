"""Safetensors folders: one file or several with an index, read and written a piece at a time."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from prefixmem_jax.errors import UserError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"

_DTYPES = {np.dtype(np.float32): "F32", np.dtype(ml_dtypes.bfloat16): "BF16"}


def has_safetensors(folder: str | Path) -> bool:
    return any((Path(folder) / name).is_file() for name in (INDEX, SINGLE))


class SafetensorsFolder:
    """The tensors of a folder; a read opens and closes its file: no page stays mapped."""

    def __init__(self, folder: str | Path):
        folder = Path(folder)
        if (folder / INDEX).is_file():
            files = _read_index(folder / INDEX)
        elif (folder / SINGLE).is_file():
            files = dict.fromkeys(self._names(folder / SINGLE), SINGLE)
        else:
            raise UserError(f"{folder}: no {SINGLE} and no {INDEX}")
        self.folder = folder
        self.files = files
        self._stored: dict[str, set[str]] = {}
        for name in sorted(set(files.values())):
            if not (folder / name).is_file():
                raise UserError(f"{folder}: {name} is missing, which {INDEX} names")
            self._stored[name] = set(self._names(folder / name))

    @staticmethod
    def _names(path: Path) -> list[str]:
        try:
            with safe_open(path, framework="np") as file:
                return list(file.keys())
        except (SafetensorError, OSError) as error:
            raise UserError(f"{path}: not a safetensors file ({error})") from None

    def holds(self, name: str) -> bool:
        """Whether a tensor that the index names is in its file."""
        return name in self._stored[self.files[name]]

    def shape(self, name: str) -> tuple[int, ...]:
        with safe_open(self.folder / self.files[name], framework="np") as file:
            return tuple(file.get_slice(name).get_shape())

    def dtype(self, name: str) -> str:
        """As the format calls it, such as `BF16`."""
        with safe_open(self.folder / self.files[name], framework="np") as file:
            return file.get_slice(name).get_dtype()

    def read(self, name: str, rows: slice = slice(None)) -> np.ndarray:
        """A tensor, or some of its rows; UserError where a number is not finite."""
        path = self.folder / self.files[name]
        with safe_open(path, framework="np") as file:
            array = file.get_slice(name)[rows]
        if not _is_finite(array):
            raise UserError(f"{path}: tensor {name} has numbers that are not finite (NaN, inf)")
        return array


def _is_finite(array: np.ndarray, piece: int = 1 << 24) -> bool:
    """Whether all numbers are, looked at some at a time: an array may be all that memory holds."""
    flat = array.reshape(-1)
    return all(
        np.isfinite(flat[start : start + piece]).all() for start in range(0, flat.size, piece)
    )


def _read_index(path: Path) -> dict[str, str]:
    """The file of each tensor; all of them lie beside the index."""
    try:
        files = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{path}: expected JSON with a weight_map ({error})") from None
    if not isinstance(files, dict) or not files:
        raise UserError(f"{path}: weight_map: expected files by tensor, got {files!r:.80}")
    for tensor, name in files.items():
        if not isinstance(name, str) or name in ("", "..") or Path(name).name != name:
            raise UserError(
                f"{path}: weight_map: {tensor}: expected a file beside the index, got {name!r:.80}"
            )
    return files


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
            _reserve(file, 8 + len(text) + end)
        for name, offset in offsets.items():
            self._at[name] = (path, 8 + len(text) + offset)

    def tensor(self, name: str) -> np.ndarray:
        """The tensor's place in its file, to assign to; written when the array is let go."""
        path, offset = self._at[name]
        shape, dtype = self._tensors[name]
        return np.memmap(path, dtype=dtype, mode="r+", offset=offset, shape=shape)


def _reserve(file: BinaryIO, size: int) -> None:
    """Makes a file so long. A full disk is an OSError here; under a memory map it is a signal."""
    file.truncate(size)
    if hasattr(os, "posix_fallocate"):  # Linux
        os.posix_fallocate(file.fileno(), 0, size)
