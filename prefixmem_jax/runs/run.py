"""A run folder, and how it opens itself: config, checkpoint, parts, data, text tokenizer."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import jax

from prefixmem_jax.config import Config
from prefixmem_jax.config_files import load_config, to_json
from prefixmem_jax.data.prepare import PreparedData, load_catalog, prepare_data
from prefixmem_jax.errors import UserError
from prefixmem_jax.files import write_json, write_text
from prefixmem_jax.inference.engine import Engine
from prefixmem_jax.kinds import kind_name
from prefixmem_jax.model_spec import ModelSpec
from prefixmem_jax.parallel.mesh import make_mesh
from prefixmem_jax.runs.checkpoint import Checkpoints, abstract_memory_part, has_checkpoint
from prefixmem_jax.semantic_ids.catalog import Catalog
from prefixmem_jax.semantic_ids.space import SidSpace
from prefixmem_jax.semantic_ids.vocabulary import Vocabulary

CONFIG, DATA = "config.json", "data.json"


@dataclass(frozen=True)
class DataDescription:
    """What a run was trained on, so that its model can be built without the data.

    Attributes:
      sha256: of the dataset's files.
      codebook_sizes: of its SIDs.
    """

    name: str
    sha256: str
    catalogue_sha256: str
    codebook_sizes: tuple[int, ...]
    items: int
    users: int

    @classmethod
    def of(cls, data: PreparedData) -> DataDescription:
        dataset, catalog = data.dataset, data.catalog
        return cls(
            dataset.name,
            dataset.sha256,
            catalog.sha256,
            catalog.space.codebook_sizes,
            len(catalog),
            len(dataset.histories),
        )


class Run:
    """One run folder; nothing is read before it is asked for.

    Everything that can be missing or wrong is a UserError that names the folder.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)

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
        return Vocabulary(space, options.text_tokens, options.vocabulary_multiple)

    def catalog(self) -> Catalog:
        """The catalogue of its data (no histories are read).

        Raises:
          UserError: its data has another catalogue by now; the model's SIDs would name other items.
        """
        return self.checked(load_catalog(self.config.data))

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
        """Parts of its newest checkpoint as `spec` wants them (default: all of the model).

        Optimizer states are never read.
        """
        wanted = spec.parts if parts is None else parts
        return self._load(spec, {part: spec.params.get(part) for part in wanted})

    def _load(self, spec: ModelSpec, dense: dict[str, Any]) -> dict[str, Any]:
        abstract = dict(dense)
        if "memory" in abstract:
            abstract["memory"] = abstract_memory_part(spec)
        with self.checkpoints() as checkpoints:
            return checkpoints.load(abstract, spec)

    def engine(
        self, catalog: Catalog | None = None, devices: Sequence[jax.Device] | None = None
    ) -> Engine:
        """Its newest checkpoint, ready to search.

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
        return Engine(spec, parts, memory, catalog, self.config.evaluation.batch_size)

    @property
    def step(self) -> int:
        """Of its newest checkpoint."""
        with self.checkpoints() as checkpoints:
            return checkpoints.latest_step

    @property
    def text_model(self) -> str | None:
        """The Hugging Face folder that its LLM came from, through the runs it was taken from."""
        run = self
        for _ in range(100):
            init = run.config.init
            if init.from_huggingface is not None:
                return init.from_huggingface
            if init.run is None or "llm" not in init.take:
                return None
            run = Run(init.run)
            if not (run.path / CONFIG).is_file():
                return None
        return None

    def claim(self, config: Config, description: DataDescription) -> None:
        """Makes the folder, or checks that its checkpoints belong to the same config and data.

        Raises:
          UserError: it holds another run; names the first differing key.
        """
        text = to_json(config)
        if (self.path / CONFIG).exists() and self.has_checkpoint:
            key = _first_difference(json.loads((self.path / CONFIG).read_text()), json.loads(text))
            if key:
                raise UserError(f"{self.path}: holds a run with another config ({key}); use --out")
            if self.data_description.sha256 != description.sha256:
                raise UserError(
                    f"{self.path}: was trained on other data (dataset sha256 "
                    f"{self.data_description.sha256[:12]}..., now {description.sha256[:12]}...)"
                )
        elif jax.process_index() == 0:
            self.path.mkdir(parents=True, exist_ok=True)
            write_json(self.path / DATA, description.__dict__)
            write_text(self.path / CONFIG, text)


def _first_difference(old: Any, new: Any, key: str = "") -> str | None:
    if isinstance(old, dict) and isinstance(new, dict):
        for name in sorted(old.keys() | new.keys()):
            difference = _first_difference(old.get(name), new.get(name), f"{key}{name}.")
            if difference:
                return difference
        return None
    return None if old == new else f"{key[:-1]} is {old} there, {new} here"
