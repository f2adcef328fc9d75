"""Orbax checkpoints by part, one layout for every stage.

A run's `checkpoints/STEP/` holds one subtree per *part*: the model's dense parts (`llm`,
`sid_encoder`, `head`), `memory` (the table's rows, and what gives them their meaning, such as the
hash multipliers), and what only training needs (`training.parts`). The data iterator's state and
the dataset's digest are the checkpoint's metadata. Any stage can read any part of any run.
"""

from __future__ import annotations

import logging
import math
import os
import threading
import time
from collections.abc import Collection
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
from prefixmem_jax.parallel.mesh import all_agree
from prefixmem_jax.runs.checksums import CHECKSUMS, FOLDER, find_damage, write_checksums
from prefixmem_jax.runs.workplace import InPlace, LocalCopy, is_finished
from prefixmem_jax.storage import is_remote, orbax_writes, tensorstore_spec

log = logging.getLogger(__name__)

# Arrays are stored in pieces of this size, so that they can be read a piece at a time.
CHUNK_BYTES = 64 << 20
# What a replica must have to write for it to be worth it.
SLICE_BYTES = 1 << 20


def has_checkpoint(run: Path) -> bool:
    """Whether the run directory holds a checkpoint, whole or not."""
    return bool(saved_steps(run))


def saved_steps(run: Path) -> list[int]:
    """Steps that have a checkpoint folder, newest first.

    A remote folder has its name from the first file on, and counts once it is whole.
    """
    folder = run / FOLDER
    found = [path for path in folder.iterdir() if path.name.isdecimal()] if folder.is_dir() else []
    if is_remote(run):
        found = [path for path in found if is_finished(path)]
    return sorted((int(path.name) for path in found), reverse=True)


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


def averaged(part: str) -> str:
    """The part with a dense part's moving average, where a run keeps one."""
    return f"average_{part}"


class Checkpoints:
    """The checkpoints of one run directory.

    Beside them, `checksums/STEP.json` holds the digest of every file. A checkpoint with a file that
    is missing or other than it was written is damaged: it is never read, and the newest whole one
    stands for it.
    """

    def __init__(self, run: Path, keep: int | None = None, metric: str | None = None):
        """Opens a run's checkpoints: for writing where `keep` is given, else only to read.

        Args:
          metric: by which one is the best, and kept beside the newest; None: by none.
        """
        self.run = run
        self.keep, self.metric = keep, metric
        if keep is None and not has_checkpoint(run):
            raise UserError(f"{run}: not a run directory with a checkpoint in {FOLDER}/")
        self._damaged: dict[int, str] = {}  # those that stay, where none is whole
        if keep is not None and jax.process_index() == 0:
            self._move_damaged()
        if orbax_writes(run):
            self._place = InPlace(run / FOLDER)
        elif keep is not None and jax.process_count() > 1:
            raise UserError(
                f"{run}: several processes cannot save there (Orbax does not write to it); "
                "expected gs://, or a folder that all share"
            )
        else:
            self._place = LocalCopy(run / FOLDER)
        self._saving: threading.Thread | None = None
        if keep is None:
            return  # to read, no process needs the others
        for step in saved_steps(run):  # what is kept is decided there
            self._place.bring(step)
        policies = ocp.training.preservation_policies
        best = policies.BestN(
            # Values of another metric, before the config named this one, cannot be compared.
            get_metric_fn=lambda metrics: metrics.get(metric, -math.inf),
            n=1,
            keep_checkpoints_without_metrics=False,
        )
        context = ocp.Context()
        saving = context.array.saving
        saving.storage_options.chunk_byte_size = CHUNK_BYTES
        # Replicas share the writing of an array, at the price of a program for each one's slice.
        saving.min_slice_bytes_for_replica_parallel = SLICE_BYTES
        # Whoever reads says where to; threads that write these would outlive a save that failed.
        saving.enable_write_sharding_file = False
        saving.array_metadata_store = None
        self._checkpointer = ocp.training.Checkpointer(
            self._place.folder,
            preservation_policy=policies.AnyPreservationPolicy([policies.LatestN(keep), best]),
            save_decision_policy=ocp.training.save_decision_policies.FixedIntervalPolicy(1),
            cleanup_tmp_directories=True,
            context=context,
        )

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, *exception: object) -> None:
        try:
            self._wait()
        finally:
            if self.keep is not None:
                self._checkpointer.close()
            self._place.close()

    def _move_damaged(self) -> None:
        """Takes damaged checkpoints out of the way of those to come; nothing is deleted.

        Where none is whole they stay: `choose` says so, each time, and no run begins anew.
        """
        damaged = {}
        for step in saved_steps(self.run):
            damage = find_damage(self.run, step)
            if damage is None:
                break
            damaged[step] = damage
        else:
            self._damaged = damaged
            return
        for step, damage in damaged.items():
            aside = self.run / "damaged" / f"{step}-{time.time_ns()}"
            aside.parent.mkdir(exist_ok=True)
            os.replace(self.run / FOLDER / str(step), aside)
            # Or they would be taken for those of the checkpoint that comes in its place.
            (self.run / CHECKSUMS / f"{step}.json").unlink(missing_ok=True)
            log.warning(f"{self.run / FOLDER}/{step} is damaged ({damage}): moved to {aside}")

    @property
    def steps(self) -> list[int]:
        """Of every checkpoint, newest first."""
        return saved_steps(self.run)

    def choose(self, step: int | None = None, without: Collection[str] = ()) -> int:
        """A step whose checkpoint is whole.

        Args:
          step: that one; None means the newest.
          without: parts that are not needed.

        Raises:
          UserError: there is none, or it is damaged.
        """
        folder, damage = self.run / FOLDER, None
        steps = saved_steps(self.run)
        if step is not None and step not in steps:
            raise UserError(f"{folder}: no step {step}; it has {', '.join(map(str, steps))}")
        for number in steps if step is None else [step]:
            if self.keep is None:
                damage = find_damage(self.run, number, without)
            elif all_agree(number not in self._damaged):  # all processes ask; the first has looked
                return number
            else:
                damage = self._damaged.get(number, "the first process says why")
            if damage is None:
                return number
            log.warning(f"{folder}/{number} is damaged ({damage})")
        raise UserError(f"{folder}: no whole checkpoint ({damage})")

    def save(
        self,
        step: int,
        parts: dict[str, Any],
        metadata: dict[str, Any],
        best: float | None = None,
    ) -> None:
        """Starts an asynchronous save; the next save, or closing, waits for it.

        Args:
          metadata: JSON, comes back from `metadata`.
          best: the metric's value by which this is the best so far, the larger the better.
        """
        self._wait()
        response = self._checkpointer.save_checkpointables_async(
            step,
            parts,
            metrics=None if best is None else {self.metric: best},
            custom_metadata=metadata,
        )
        if jax.process_index() == 0:
            self._failure: BaseException | None = None
            self._saving = threading.Thread(target=self._finish, args=(response, step))
            self._saving.start()

    def _finish(self, response: Any, step: int) -> None:
        try:
            response.result()
            self._place.publish(step)
            write_checksums(self.run, step)
        except BaseException as error:
            self._failure = error

    def _wait(self) -> None:
        """For the save that is under way; its failure is raised here."""
        if self._saving is not None:
            self._saving.join()
            self._saving = None
            if self._failure is not None:
                raise self._failure

    def metadata(self, step: int) -> dict[str, Any]:
        """What the checkpoint of a step was saved with."""
        return self._describe(step).custom_metadata

    def _describe(self, step: int) -> Any:
        """What Orbax says of the checkpoint of a step."""
        self._place.bring(step)
        return ocp.checkpointables_metadata(self._place.folder / str(step))

    def load(self, abstract_parts: dict[str, Any], spec: ModelSpec, step: int) -> dict[str, Any]:
        """Reads parts of the checkpoint of a step, every leaf accounted for.

        Args:
          spec: the model that they are for.

        Raises:
          UserError: a part or leaf is missing, left over or of another shape, or the memory was
            trained as another one.
        """
        where = f"{self.run / FOLDER}/{step}"
        saved = self._describe(step).metadata
        for part, tree in abstract_parts.items():
            if part not in saved:
                raise UserError(f"{where}: no part {part!r}; it has {', '.join(sorted(saved))}")
            expected, present = _shapes(tree), _shapes(saved[part])
            for leaf in sorted(expected.keys() | present.keys()):
                if expected.get(leaf) != present.get(leaf):
                    raise UserError(
                        f"{where}: {part}{leaf}: expected {expected.get(leaf, 'nothing')}, the "
                        f"checkpoint has {present.get(leaf, 'nothing')}"
                    )
        loaded = {
            part: jax.tree_util.tree_map_with_path(
                lambda path, leaf, part=part: read_array(self._open(step, part, path), leaf), tree
            )
            for part, tree in abstract_parts.items()
        }
        if "memory" in loaded:
            check_row_meaning(spec, loaded["memory"], where)
        return loaded

    def open_rows(self, spec: ModelSpec, step: int) -> ts.TensorStore:
        """A step's memory rows on disk; `open_rows(...)[a:b].read().result()`.

        Raises:
          UserError: the memory was trained as another one.
        """

        def opened(name: str) -> ts.TensorStore:
            return self._open(step, "memory", (jax.tree_util.DictKey(name),))

        saved = {name: opened(name).read().result() for name in row_meaning(spec)}
        check_row_meaning(spec, saved, f"{self.run / FOLDER}/{step}")
        return opened("rows")

    def _open(self, step: int, part: str, path: tuple) -> ts.TensorStore:
        """An array on disk, by its path in the part's tree."""
        self._place.bring(step)
        base = tensorstore_spec(self._place.folder / str(step) / part)
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        kvstore = {"driver": "ocdbt", "base": base, "path": f"{name}/"}
        return ts.open({"driver": "zarr3", "kvstore": kvstore}).result()


def read_array(stored: ts.TensorStore, target: jax.ShapeDtypeStruct) -> jax.Array:
    """An array on disk as an array on the devices, a piece at a time.

    Orbax's own restore holds every array twice. Here each device's share is put together in memory
    that a CPU device takes over as it is; another device's is let go once it is copied there.
    """

    def share(index: tuple[slice, ...]) -> np.ndarray:
        bounds = [cut.indices(size)[:2] for cut, size in zip(index, target.shape, strict=True)]
        host = _aligned([stop - start for start, stop in bounds], target.dtype)
        if not bounds:
            host[...] = stored.read().result()
            return host
        (first, last), rest = bounds[0], tuple(slice(*bound) for bound in bounds[1:])
        rows = stored.chunk_layout.read_chunk.shape[0]
        start = first
        while start < last:  # one stored chunk after the other
            stop = min(start - start % rows + rows, last)
            host[start - first : stop - first] = stored[(slice(start, stop), *rest)].read().result()
            start = stop
        return host

    return jax.make_array_from_callback(target.shape, target.sharding, share)


def _aligned(shape: list[int], dtype: np.dtype) -> np.ndarray:
    """An empty array that starts where XLA wants one to start, so that it need not be copied."""
    size = math.prod(shape) * np.dtype(dtype).itemsize
    raw = np.empty(size + 64, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + size].view(dtype).reshape(shape)


def _shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {_path(path): tuple(leaf.shape) for path, leaf in leaves}


def _path(path: tuple) -> str:
    """`/a/b/0`, the same for attributes, dict keys and indices (Orbax keeps only names)."""
    return "".join("/" + jax.tree_util.keystr((key,), simple=True) for key in path)
