"""Orbax checkpoints by part, one layout for every stage.

A run's `checkpoints/STEP/` holds one subtree per *part*: the model's dense parts (`llm`,
`sid_encoder`, `head`), `memory` (the table's rows, and what gives them their meaning, such as the
hash multipliers), and what only training needs (`training.parts`). The data iterator's state and
the dataset's digest are the checkpoint's metadata. Any stage can read any part of any run.
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
from prefixmem_jax.model_spec import ModelSpec

FOLDER = "checkpoints"
# Arrays are stored in pieces of this size, so that they can be read a piece at a time.
CHUNK_BYTES = 64 << 20


def has_checkpoint(run: Path) -> bool:
    """Whether the run directory holds a finished checkpoint."""
    folder = run / FOLDER
    return folder.is_dir() and any(ocp.is_orbax_checkpoint(path) for path in folder.iterdir())


def row_meaning(spec: ModelSpec) -> dict[str, np.ndarray]:
    """What the memory's rows mean nothing without, saved in part `memory` beside them."""
    return spec.config.sid_encoder.row_meaning(spec.vocabulary.space)


def memory_part(spec: ModelSpec, rows: jax.Array) -> dict[str, jax.Array]:
    """Part `memory` of these rows."""
    everywhere = NamedSharding(spec.mesh, P())
    return {"rows": rows} | {
        name: jax.make_array_from_process_local_data(everywhere, array)
        for name, array in row_meaning(spec).items()
    }


def abstract_memory_part(spec: ModelSpec) -> dict[str, jax.ShapeDtypeStruct]:
    """Part `memory` of a model, abstract."""
    everywhere = NamedSharding(spec.mesh, P())
    return {"rows": spec.memory} | {
        name: jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=everywhere)
        for name, array in row_meaning(spec).items()
    }


def check_row_meaning(spec: ModelSpec, memory: dict[str, Any], where: str) -> None:
    """Raises UserError where a saved part `memory` means nothing to this model."""
    for name, expected in row_meaning(spec).items():
        saved = np.asarray(memory[name])
        if not np.array_equal(saved, expected):
            what = spec.config.sid_encoder.explain_row_meaning(name, saved)
            raise UserError(f"{where}: memory was trained with {what}; tables mean nothing here")


class Checkpoints:
    """The checkpoints of one run directory."""

    def __init__(self, run: Path, keep: int | None = None):
        """Opens a run's checkpoints: for writing where `keep` is given, else only to read."""
        self.run = run
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

    @property
    def where(self) -> str:
        """The newest checkpoint, for messages."""
        return f"{self.run / FOLDER}/{self.latest_step}"

    def save(self, step: int, parts: dict[str, Any], metadata: dict[str, Any]) -> None:
        """Starts an asynchronous save; the next save, or closing, waits for it.

        Args:
          metadata: JSON, comes back from `metadata`.
        """
        self._checkpointer.save_checkpointables_async(step, parts, custom_metadata=metadata)

    def metadata(self) -> dict[str, Any]:
        """What the newest checkpoint was saved with."""
        return self._checkpointer.checkpointables_metadata(self.latest_step).custom_metadata

    def load(self, abstract_parts: dict[str, Any], spec: ModelSpec) -> dict[str, Any]:
        """Reads parts of the newest checkpoint, every leaf accounted for.

        Args:
          spec: the model that they are for.

        Raises:
          UserError: a part or leaf is missing, left over or of another shape, or the memory was
            trained as another one.
        """
        step = self.latest_step
        saved = self._checkpointer.checkpointables_metadata(step).metadata
        for part, tree in abstract_parts.items():
            if part not in saved:
                names = ", ".join(sorted(saved))
                raise UserError(f"{self.where}: no part {part!r}; it has {names}")
            expected, present = _shapes(tree), _shapes(saved[part])
            for leaf in sorted(expected.keys() | present.keys()):
                if expected.get(leaf) != present.get(leaf):
                    raise UserError(
                        f"{self.where}: {part}{leaf}: expected {expected.get(leaf, 'nothing')}, "
                        f"the checkpoint has {present.get(leaf, 'nothing')}"
                    )
        loaded = self._checkpointer.load_checkpointables(step, abstract_parts)
        if "memory" in loaded:
            check_row_meaning(spec, loaded["memory"], self.where)
        return loaded

    def open_rows(self, spec: ModelSpec) -> ts.TensorStore:
        """The newest checkpoint's memory rows on disk; `open_rows()[a:b].read().result()`.

        Raises:
          UserError: the memory was trained as another one.
        """
        names = row_meaning(spec)
        saved = {name: self._open_memory(name).read().result() for name in names}
        check_row_meaning(spec, saved, self.where)
        return self._open_memory("rows")

    def _open_memory(self, name: str) -> ts.TensorStore:
        folder = self.run.resolve() / FOLDER / str(self.latest_step) / "memory"
        kvstore = {"driver": "ocdbt", "base": f"file://{folder}/", "path": f"{name}/"}
        return ts.open({"driver": "zarr3", "kvstore": kvstore}).result()


def _shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {_path(path): tuple(leaf.shape) for path, leaf in leaves}


def _path(path: tuple) -> str:
    """`/a/b/0`, the same for attributes, dict keys and indices (Orbax keeps only names)."""
    return "".join("/" + jax.tree_util.keystr((key,), simple=True) for key in path)
