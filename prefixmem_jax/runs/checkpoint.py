"""Orbax checkpoints, one layout for every stage.

A run's `checkpoints/STEP/` holds one subtree per *part*: the model's dense parts (`llm`,
`encoder`, `head`), `memory` (the table's rows, and the hash multipliers and layout that give
them their meaning), `optimizer`, `memory_optimizer` and `step` (the number of updates). The data
iterator's state and the dataset's digest are the checkpoint's metadata. Any stage can read any part
of any run.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint.experimental.v1 as ocp
import tensorstore as ts
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from prefixmem_jax.errors import UserError
from prefixmem_jax.sid_encoders.prefix_memory import make_hash
from prefixmem_jax.memory.hashing import SCHEMES
from prefixmem_jax.training.step import Trainer, TrainState

FOLDER = "checkpoints"
# Arrays are stored in pieces of this size, so that they can be read a piece at a time.
CHUNK_BYTES = 64 << 20


def to_parts(state: TrainState, hash_arrays: dict[str, Any] | None) -> dict[str, Any]:
    """The state as checkpoint parts; `hash_arrays` as from `memory.encoder.make_hash`."""
    parts = {**state.params, "optimizer": state.optimizer, "step": {"count": state.step}}
    if state.memory is not None:
        parts["memory"] = {"rows": state.memory, **hash_arrays}
        parts["memory_optimizer"] = state.memory_optimizer
    return parts


def from_parts(parts: dict[str, Any]) -> TrainState:
    """The inverse of `to_parts`."""
    others = ("optimizer", "memory", "memory_optimizer", "step")
    return TrainState(
        parts["step"]["count"],
        {name: tree for name, tree in parts.items() if name not in others},
        parts["optimizer"],
        parts["memory"]["rows"] if "memory" in parts else None,
        parts.get("memory_optimizer"),
    )


def has_checkpoint(run: Path) -> bool:
    """Whether the run directory holds a finished checkpoint."""
    folder = run / FOLDER
    return folder.is_dir() and any(ocp.is_orbax_checkpoint(path) for path in folder.iterdir())


class Checkpoints:
    """The checkpoints of one run directory."""

    def __init__(self, run: Path, trainer: Trainer, keep: int | None = None):
        """Opens a run's checkpoints: for writing where `keep` is given, else only to read."""
        self.run = run
        self.trainer = trainer
        folder = run / FOLDER
        if keep is None and not has_checkpoint(run):
            raise UserError(f"{run}: not a run directory with a checkpoint in {FOLDER}/")
        policy = None if keep is None else ocp.training.preservation_policies.LatestN(keep)
        context = ocp.Context()
        context.array.saving.storage_options.chunk_byte_size = CHUNK_BYTES
        self._checkpointer = ocp.training.Checkpointer(
            folder.resolve(),
            preservation_policy=policy,
            save_decision_policy=ocp.training.save_decision_policies.FixedIntervalPolicy(1),
            cleanup_tmp_directories=keep is not None,
            context=context,
        )

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, *exception: object) -> None:
        self._checkpointer.close()

    @property
    def latest_step(self) -> int | None:
        latest = self._checkpointer.latest
        return None if latest is None else latest.step

    def _hash_arrays(self) -> dict[str, np.ndarray] | None:
        encoder = self.trainer.config.encoder
        return None if encoder is None else make_hash(encoder, self.trainer.space)

    def save(self, step: int, state: TrainState, metadata: dict[str, Any]) -> None:
        """Starts an asynchronous save; the next save, or closing, waits for it.

        Args:
          metadata: JSON, comes back from `metadata`.
        """
        self.save_parts(step, to_parts(state, self._placed_hash()), metadata)

    def save_parts(self, step: int, parts: dict[str, Any], metadata: dict[str, Any]) -> None:
        """Starts an asynchronous save of any parts; see `memory_part` for the memory."""
        self._checkpointer.save_checkpointables_async(step, parts, custom_metadata=metadata)

    def memory_part(self, rows: jax.Array) -> dict[str, jax.Array]:
        """Part `memory` of these rows."""
        return {"rows": rows, **self._placed_hash()}

    def _placed_hash(self) -> dict[str, jax.Array] | None:
        hash_arrays = self._hash_arrays()
        replicated = NamedSharding(self.trainer.mesh, P())
        return hash_arrays and {
            name: jax.make_array_from_process_local_data(replicated, array)
            for name, array in hash_arrays.items()
        }

    def metadata(self) -> dict[str, Any]:
        """What the newest checkpoint was saved with."""
        return self._checkpointer.checkpointables_metadata(self.latest_step).custom_metadata

    def restore(self) -> tuple[int, TrainState]:
        """Step and state of the newest checkpoint."""
        parts = to_parts(self.trainer.abstract_state(), self._abstract_hash())
        return self.latest_step, from_parts(self.load(parts))

    def _abstract_hash(self) -> dict[str, jax.ShapeDtypeStruct] | None:
        hash_arrays = self._hash_arrays()
        replicated = NamedSharding(self.trainer.mesh, P())
        return hash_arrays and {
            name: jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=replicated)
            for name, array in hash_arrays.items()
        }

    def abstract_memory(self) -> dict[str, jax.ShapeDtypeStruct]:
        return {"rows": self.trainer.abstract_state().memory, **self._abstract_hash()}

    def load(self, abstract_parts: dict[str, Any]) -> dict[str, Any]:
        """Reads parts of the newest checkpoint, every leaf accounted for.

        Raises:
          UserError: a part or leaf is missing, left over or of another shape, or the memory was
            trained under another hash.
        """
        step = self.latest_step
        where = f"{self.run / FOLDER}/{step}"
        saved = self._checkpointer.checkpointables_metadata(step).metadata
        for part, tree in abstract_parts.items():
            if part not in saved:
                raise UserError(f"{where}: no part {part!r}; it has {', '.join(sorted(saved))}")
            expected, found = _shapes(tree), _shapes(saved[part])
            for leaf in sorted(expected.keys() | found.keys()):
                if expected.get(leaf) != found.get(leaf):
                    raise UserError(
                        f"{where}: {part}{leaf}: expected {expected.get(leaf, 'nothing')}, the "
                        f"checkpoint has {found.get(leaf, 'nothing')}"
                    )
        loaded = self._checkpointer.load_checkpointables(step, abstract_parts)
        if "memory" in loaded:
            self._check_hash(loaded["memory"], where)
        return loaded

    def open_rows(self) -> ts.TensorStore:
        """The newest checkpoint's memory rows on disk; `open_rows()[a:b].read().result()`.

        Raises:
          UserError: the memory was trained under another hash.
        """
        where = f"{self.run / FOLDER}/{self.latest_step}"
        hash_arrays = {
            name: self._open_memory(name).read().result() for name in self._hash_arrays()
        }
        self._check_hash(hash_arrays, where)
        return self._open_memory("rows")

    def _open_memory(self, name: str) -> ts.TensorStore:
        folder = self.run.resolve() / FOLDER / str(self.latest_step) / "memory"
        kvstore = {"driver": "ocdbt", "base": f"file://{folder}/", "path": f"{name}/"}
        return ts.open({"driver": "zarr3", "kvstore": kvstore}).result()

    def _check_hash(self, memory: dict[str, Any], where: str) -> None:
        for name, expected in self._hash_arrays().items():
            found = np.asarray(memory[name])
            if not np.array_equal(found, expected):
                if name == "layout":
                    orders, heads, rows, scheme = found
                    what = f"orders={orders} heads={heads} rows={rows} address={SCHEMES[scheme]}"
                else:
                    what = "other hash multipliers (another encoder.seed)"
                raise UserError(
                    f"{where}: memory was trained with {what}; tables mean nothing here"
                )


def _shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {_path(path): tuple(leaf.shape) for path, leaf in leaves}


def _path(path: tuple) -> str:
    """`/a/b/0`, the same for attributes, dict keys and indices (Orbax keeps only names)."""
    return "".join("/" + jax.tree_util.keystr((key,), simple=True) for key in path)
