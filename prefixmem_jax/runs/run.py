"""A run folder, and how it opens itself: config, checkpoint, parts, data, text tokenizer."""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import jax

from prefixmem_jax.config import Config
from prefixmem_jax.config_files import load_config, to_json
from prefixmem_jax.config_groups import DataConfig
from prefixmem_jax.data.prepare import PreparedData, TrainingData, load_catalog, prepare_data
from prefixmem_jax.data.shards import index_sha256
from prefixmem_jax.data.texts import tokenizer_sha256
from prefixmem_jax.data.transitions import Transitions
from prefixmem_jax.errors import UserError
from prefixmem_jax.files import sha256_of, write_json, write_text
from prefixmem_jax.inference.engine import Engine
from prefixmem_jax.kinds import kind_name
from prefixmem_jax.model_spec import ModelSpec
from prefixmem_jax.parallel.mesh import make_mesh
from prefixmem_jax.runs.checkpoint import (
    Checkpoints,
    abstract_memory_part,
    averaged,
    has_checkpoint,
)
from prefixmem_jax.runs.checksums import CHECKSUMS
from prefixmem_jax.runs.metrics import read_metrics
from prefixmem_jax.semantic_ids.catalog import Catalog
from prefixmem_jax.semantic_ids.space import SidSpace
from prefixmem_jax.semantic_ids.vocabulary import Vocabulary
from prefixmem_jax.storage import absolute, is_remote, make_folder, to_path

log = logging.getLogger(__name__)

CONFIG, DATA, TRANSITIONS = "config.json", "data.json", "transitions.npz"
LOCK = ".lock"
# Groups that may change from one call of `train` to the next: they do not decide what is learnt.
FREE = ("log_every_steps", "wandb", "checkpoint", "evaluation", "mesh")
# Where its data lie; that they are the same is known by their digests.
PLACES = ("data.path", "data.tokenizer", "data.packed")


@dataclass(frozen=True)
class DataDescription:
    """What a run was trained on, so that its model can be built without the data.

    Attributes:
      sha256: of the dataset's files.
      codebook_sizes: of its SIDs.
      tokenizer_sha256, packed_sha256: of its text tokenizer's file and of the index of its packed
        rows, or None.
    """

    name: str
    sha256: str
    catalogue_sha256: str
    codebook_sizes: tuple[int, ...]
    items: int
    users: int
    tokenizer_sha256: str | None = None
    packed_sha256: str | None = None

    @classmethod
    def of(cls, data: TrainingData, config: DataConfig) -> DataDescription:
        """Of data, and of the other files that a config names."""
        return cls(
            **data.facts._asdict(),
            codebook_sizes=data.vocabulary.space.codebook_sizes,
            tokenizer_sha256=(
                None if config.tokenizer is None else tokenizer_sha256(config.tokenizer)
            ),
            packed_sha256=None if config.packed is None else index_sha256(config.packed),
        )


class Run:
    """One run folder; nothing is read before it is asked for.

    Everything that can be missing or wrong is a UserError that names the folder.
    """

    def __init__(self, path: str | Path, step: int | str | None = None):
        """A run's folder.

        Args:
          step: of the checkpoint to read; `best` means the one with the best `select_by` of its
            config (else the lowest validation loss) among those that are kept; None that one where
            its config has a `select_by`, else the newest whole one.
        """
        self.path = to_path(path)
        self._step = step

    @cached_property
    def config(self) -> Config:
        """The resolved config that it was trained with."""
        if not (self.path / CONFIG).is_file():
            raise UserError(f"{self.path}: not a run directory (it has no {CONFIG})")
        return load_config(self.path / CONFIG)

    @cached_property
    def data_description(self) -> DataDescription:
        try:
            content = json.loads((self.path / DATA).read_text())
            content["codebook_sizes"] = tuple(content["codebook_sizes"])
            return DataDescription(**content)
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise UserError(f"{self.path / DATA}: not a run's data description ({error})") from None

    @property
    def has_checkpoint(self) -> bool:
        return has_checkpoint(self.path)

    def checkpoints(self) -> Checkpoints:
        """Its checkpoints, to read."""
        return Checkpoints(self.path)

    @property
    def vocabulary(self) -> Vocabulary:
        """Of its model; no data is read."""
        options = self.config.data
        space = SidSpace(self.data_description.codebook_sizes)
        items = self.data_description.items
        return Vocabulary(space, options.text_tokens, options.vocabulary_multiple, items)

    def catalog(self, place: str | Path | None = None) -> Catalog:
        """The catalogue of its data (no histories are read).

        Args:
          place: where it lies now: a dataset folder, or the items.jsonl of an export.

        Raises:
          UserError: there is another catalogue by now; the model's SIDs would name other items.
        """
        options, sizes = self.config.data, self.data_description.codebook_sizes
        if place is None:
            return self.checked(load_catalog(options))
        if to_path(place).is_file():
            return self.checked(Catalog.read_jsonl(place, sizes))
        moved = replace(options, path=str(place), codebook_sizes=sizes)
        return self.checked(load_catalog(moved))

    def checked(self, catalog: Catalog) -> Catalog:
        """The catalogue, where it is the one that the run was trained with."""
        trained = self.data_description
        if catalog.sha256 != trained.catalogue_sha256:
            raise UserError(
                f"{self.path}: was trained with another catalogue (sha256 "
                f"{trained.catalogue_sha256[:12]}..., this one {catalog.sha256[:12]}...)"
            )
        return catalog

    def data(self, folder: str | None = None) -> PreparedData:
        """Its data, split as it was for training.

        Args:
          folder: where the same items lie now, with other histories perhaps.
        """
        options = self.config.data
        if folder is not None:
            sizes = self.data_description.codebook_sizes
            options = replace(options, path=folder, codebook_sizes=sizes)
        data = prepare_data(options)
        self.checked(data.catalog)
        return data

    @cached_property
    def transitions(self) -> Transitions | None:
        """What stood next to what in training, where the run has counted it."""
        path, items = self.path / TRANSITIONS, self.data_description.items
        if not path.is_file():
            return None
        found = Transitions.load(path)
        if found.near.shape[0] != items:
            raise UserError(f"{path}: of {found.near.shape[0]} items, the run has {items}")
        return found

    def identity(self) -> str:
        """What another model, or this one after other training, does not have."""
        config = to_json(self.config)
        return f"{absolute(self.path)} {self.step} {config} {self.learnt_sha256}"

    @property
    def learnt_sha256(self) -> str:
        """Digest of the step's checkpoint, where it has checksums, and of the counts."""
        files = (self.path / CHECKSUMS / f"{self.step}.json", self.path / TRANSITIONS)
        digests = [sha256_of(file) for file in files if file.is_file()]
        return hashlib.sha256(b"".join(digests)).hexdigest()

    def check_generates(self) -> None:
        """Raises UserError where its model does not generate SIDs."""
        if not self.config.objective.generates:
            kind = kind_name(type(self.config.objective))
            raise UserError(
                f"{self.path}: a {kind} run has no decoder; name a run that generates SIDs"
            )

    def spec(self, devices: Sequence[jax.Device] | None = None) -> ModelSpec:
        """Its model on these devices (default: all of all processes), data-parallel."""
        return ModelSpec.create(self.config, self.vocabulary, make_mesh(devices=devices))

    def load(self, spec: ModelSpec, parts: Iterable[str] | None = None) -> dict[str, Any]:
        """Parts of the checkpoint of `step` as `spec` wants them (default: all of the model).

        Optimizer states are never read.
        """
        wanted = spec.parts if parts is None else parts
        return self._load(spec, {part: spec.params.get(part) for part in wanted})

    def _load(self, spec: ModelSpec, dense: dict[str, Any]) -> dict[str, Any]:
        abstract = dict(dense)
        if "memory" in abstract:
            abstract["memory"] = abstract_memory_part(spec)
        names = {part: part for part in abstract}
        if self.config.optimizer.average_decay is not None:
            names |= {part: averaged(part) for part in abstract if part != "memory"}
        with self.checkpoints() as checkpoints:
            saved = checkpoints.load(
                {names[part]: tree for part, tree in abstract.items()}, spec, self.step
            )
        return {part: saved[name] for part, name in names.items()}

    def engine(
        self, catalog: Catalog | None = None, devices: Sequence[jax.Device] | None = None
    ) -> Engine:
        """The checkpoint of `step`, ready to search.

        Args:
          catalog: default: that of its data.
          devices: default: all of all processes.
        """
        self.check_generates()
        spec = self.spec(devices)
        catalog = self.catalog() if catalog is None else self.checked(catalog)
        parts = self._load(
            spec, {**spec.replicated(), **dict.fromkeys(spec.parts[len(spec.params) :])}
        )
        memory = parts.pop("memory", {"rows": None})["rows"]
        return Engine(
            spec, parts, memory, catalog, self.config.evaluation.batch_size, self.transitions
        )

    @cached_property
    def step(self) -> int:
        """Of the checkpoint that its model is read from.

        Raises:
          UserError: there is no such checkpoint, or it is damaged.
        """
        others = {"optimizer", "memory_optimizer", "step"}
        with self.checkpoints() as checkpoints:
            step = self._step
            if step == "best" or (step is None and self.config.evaluation.select_by is not None):
                step = self._best(checkpoints.steps)
            return checkpoints.choose(step, without=others)

    def _best(self, steps: Sequence[int]) -> int | None:
        """The best by validation; None, where it need not be, before there is one."""
        metric = self.config.evaluation.select_by or "loss"
        values = {
            record["step"]: record[f"validation/{metric}"]
            for record in read_metrics(self.path)
            if f"validation/{metric}" in record and record["step"] in steps
        }
        if not values and self._step is None:
            return None
        if not values:
            raise UserError(
                f"{self.path}: no kept checkpoint has a validation {metric}; make "
                "checkpoint.every_steps a multiple of evaluation.every_steps"
            )
        return min(values, key=values.get) if metric == "loss" else max(values, key=values.get)

    @property
    def is_locked(self) -> bool:
        """Whether a process of this machine is training it; not known of remote ones."""
        if is_remote(self.path):
            return False
        try:
            with (self.path / LOCK).open() as file:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except FileNotFoundError:
            return False
        except BlockingIOError:
            return True
        return False

    @property
    def text_model(self) -> str | None:
        """The folder of its text tokenizer: the one that its documents were written with, or the
        Hugging Face folder that its LLM came from; through the runs that this was taken from.
        """
        run = self
        for _ in range(100):
            if run.config.data.tokenizer is not None:
                return run.config.data.tokenizer
            init = run.config.init
            if init.from_huggingface is not None:
                return init.from_huggingface
            if init.run is None or "llm" not in init.take:
                return None
            run = Run(init.run)
            if not (run.path / CONFIG).is_file():
                return None
        return None

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Makes the folder, and keeps other trainings out of it; a killed process lets go of it.

        Remote folders have no locks.

        Raises:
          UserError: another one is at it.
        """
        if is_remote(self.path):
            yield
            return
        make_folder(self.path)
        with (self.path / LOCK).open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UserError(
                    f"{self.path}: another process is training this run; wait for it, or use --out"
                ) from None
            yield

    def claim(self, config: Config, description: DataDescription) -> None:
        """Writes what the run is, or checks that its checkpoints belong to the same.

        A run may be extended by more `steps`, looked at otherwise (`FREE`), and its data may have
        moved (`PLACES`).

        Raises:
          UserError: it holds another run; names the first differing key.
        """
        if self.has_checkpoint and (self.path / CONFIG).exists():
            old = self.config
            for key, was, now in differences(json.loads(to_json(old)), json.loads(to_json(config))):
                if key == "steps" and now > was:
                    log.warning(
                        f"{self.path}: extended from {was} to {now} steps; from here on the "
                        "learning rate follows the longer schedule"
                    )
                elif key.partition(".")[0] not in FREE and key not in PLACES:
                    raise UserError(
                        f"{self.path}: holds a run with another config ({key} is {was} there, "
                        f"{now} here); use --out"
                    )
            if self.data_description.sha256 != description.sha256:
                raise UserError(
                    f"{self.path}: was trained on other data (dataset sha256 "
                    f"{self.data_description.sha256[:12]}..., now {description.sha256[:12]}...)"
                )
            for key in ("tokenizer", "packed"):
                was, now = (
                    getattr(one, f"{key}_sha256") for one in (self.data_description, description)
                )
                if was != now:
                    raise UserError(
                        f"{self.path}: data.{key}={getattr(config.data, key)} holds something else "
                        "than what it was trained with"
                    )
        if jax.process_index() == 0:
            make_folder(self.path)
            write_json(self.path / DATA, description.__dict__)
            write_text(self.path / CONFIG, to_json(config))
        # Other processes need not wait until the first has written them.
        self.config, self.data_description = config, description


def differences(old: Any, new: Any, key: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Keys whose values differ: (dotted key, old, new)."""
    if isinstance(old, dict) and isinstance(new, dict):
        for name in sorted(old.keys() | new.keys()):
            yield from differences(old.get(name), new.get(name), f"{key}{name}.")
    elif old != new:
        yield key[:-1], old, new
