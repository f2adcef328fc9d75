"""Orbax checkpoints, one layout for every stage.

A run's `checkpoints/STEP/` holds one subtree per *part*: the model's dense parts (`llm`,
`encoder`, `head`), `memory` (the table's rows, and the hash multipliers and layout that give
them their meaning), `optimizer`, `memory_optimizer` and `step` (the number of updates). The data
iterator's state and the dataset's digest are the checkpoint's metadata. Any stage can read any part
of any run.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint.experimental.v1 as ocp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from prefixmem_jax.config import InitConfig
from prefixmem_jax.errors import UserError
from prefixmem_jax.memory.encoder import make_hash
from prefixmem_jax.memory.hashing import SCHEMES
from prefixmem_jax.training.step import Trainer, TrainState

FOLDER = "checkpoints"


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
        self._checkpointer = ocp.training.Checkpointer(
            folder.resolve(),
            preservation_policy=policy,
            save_decision_policy=ocp.training.save_decision_policies.FixedIntervalPolicy(1),
            cleanup_tmp_directories=keep is not None,
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
        hash_arrays = self._hash_arrays()
        if hash_arrays is not None:
            replicated = NamedSharding(self.trainer.mesh, P())
            hash_arrays = {
                name: jax.make_array_from_process_local_data(replicated, array)
                for name, array in hash_arrays.items()
            }
        self._checkpointer.save_checkpointables_async(
            step, to_parts(state, hash_arrays), custom_metadata=metadata
        )

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


def initial_state(trainer: Trainer, options: InitConfig, seed: int) -> TrainState:
    """A run's first state: from another run, from a Hugging Face folder, or from scratch."""
    state = trainer.init_sharded(seed)
    parts = [*state.params, *(["memory"] if state.memory is not None else [])]
    for name in (*options.take, *options.fresh):
        if name not in parts:
            raise UserError(f"init: no part {name!r} in this model; it has {', '.join(parts)}")
    if options.run is None and options.take:
        raise UserError(f"init.take names part {options.take[0]!r} but init.run is none")
    if options.run is None and options.from_huggingface is None:
        if options.fresh:
            raise UserError(
                f"init.fresh names part {options.fresh[0]!r} but init.run and "
                "init.from_huggingface are none"
            )
        return state
    imported = ("llm",) if options.from_huggingface is not None else ()
    for part in parts:
        if (part in options.take) + (part in options.fresh) + (part in imported) != 1:
            raise UserError(
                f"init: part {part!r} must be in exactly one of init.take and init.fresh"
                + (" (llm comes from init.from_huggingface)" if imported else "")
            )
    loaded = {}
    if options.run is not None:
        loaded = _parts_of_run(trainer, options)
    memory = loaded.pop("memory", {"rows": state.memory})["rows"]
    if imported:
        if "llm" not in parts:
            raise UserError("init.from_huggingface: this objective has no part 'llm'")
        loaded["llm"] = _from_huggingface(trainer, options.from_huggingface, seed)
    return state._replace(params={**state.params, **loaded}, memory=memory)


def _parts_of_run(trainer: Trainer, options: InitConfig) -> dict[str, Any]:
    if not has_checkpoint(Path(options.run)):
        raise UserError(
            f"init.run={options.run}: not a run directory with a checkpoint; train that stage "
            "first, or name another run"
        )
    with Checkpoints(Path(options.run), trainer) as source:
        abstract = {
            part: source.abstract_memory()
            if part == "memory"
            else trainer.abstract_state().params[part]
            for part in options.take
        }
        return source.load(abstract)


def _from_huggingface(trainer: Trainer, folder: str, seed: int) -> dict[str, Any]:
    from prefixmem_jax.hf.families import read_config  # only here: transformers is slow to import
    from prefixmem_jax.hf.load import load_decoder

    described, vocabulary = read_config(folder)
    model, data = trainer.config.model, trainer.config.data
    ours = {"compute_dtype": model.compute_dtype, "remat": model.remat}
    described = dataclasses.replace(described, **ours)
    for item in dataclasses.fields(described):
        theirs, here = getattr(described, item.name), getattr(model, item.name)
        if theirs != here:
            raise UserError(
                f"init.from_huggingface={folder}: its {item.name} is {theirs}, model.{item.name} "
                f"is {here}"
            )
    if vocabulary != data.text_tokens:
        raise UserError(
            f"init.from_huggingface={folder}: its vocabulary has {vocabulary} tokens, "
            f"data.text_tokens is {data.text_tokens}"
        )
    return load_decoder(folder, model, trainer.abstract_state().params["llm"], seed)
