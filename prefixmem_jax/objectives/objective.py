"""What a stage learns: the interface that step and loop know, and nothing more of it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import jax
from flax import nnx
from jax.sharding import Mesh

from prefixmem_jax.config_groups import DataConfig
from prefixmem_jax.data.batch import Rows
from prefixmem_jax.data.documents.document import Corpus
from prefixmem_jax.data.prepare import TrainingData, prepare_data
from prefixmem_jax.kinds import Kind
from prefixmem_jax.memory.table import Lookup
from prefixmem_jax.semantic_ids.vocabulary import Vocabulary


@dataclass(frozen=True)
class Objective(Kind, ABC):
    """Builds its model, says its batch, gives loss sums and how they are summarised.

    A model is an `nnx.Module` whose attributes are the parts of a checkpoint. If a memory table
    belongs to it, its method `memory_addresses(batch, key)` says which rows a batch needs.
    """

    package: ClassVar[str] = "prefixmem_jax.objectives"
    # Whether the model is a `SidLM`, which can recommend and be evaluated.
    generates: ClassVar[bool] = False
    # Whether its LLM is a decoder too, which Hugging Face folders hold.
    exports: ClassVar[bool] = False
    # What it learns from, one by one: what a run counts.
    unit: ClassVar[str] = "tokens"
    # Parts that `moved` gives: they get no gradient, and no optimizer touches them.
    moved_parts: ClassVar[tuple[str, ...]] = ()

    @property
    def sids_alone(self) -> bool:
        """Whether its softmax is over the tokens of SIDs alone."""
        return False

    def check(self, config: Any) -> None:
        """Raises UserError where another group of the `config.Config` does not go with it."""

    def prepare(self, config: DataConfig) -> TrainingData:
        """What there is to learn from."""
        return prepare_data(config)

    @abstractmethod
    def build_model(self, config: Any, vocabulary: Vocabulary, rngs: nnx.Rngs) -> nnx.Module:
        """The model that a `config.Config` describes and this trains, freshly drawn."""

    def first_values(self, config: Any, data: TrainingData, mesh: Mesh) -> dict[str, Any]:
        """Parameters that a run, where it takes none of another one, starts from in place of drawn
        ones: host arrays by name, by part.

        Args:
          mesh: of this process's devices, to compute them on.
        """
        del config, data, mesh
        return {}

    @abstractmethod
    def abstract_batch(
        self, data: DataConfig, sharding: jax.sharding.Sharding | None = None
    ) -> Rows:
        """Shapes and dtypes of a global batch."""

    @abstractmethod
    def training_rows(self, corpus: Corpus, seed: int) -> Rows:
        """Everything there is to learn from, on the host; batches are drawn from its rows."""

    @property
    def mixes_documents(self) -> bool:
        """Whether there are several kinds of documents, whose shares depend on all there is."""
        return False

    def count_documents(self, corpus: Corpus) -> tuple[int, ...]:
        """How many documents of each kind a part of a corpus has, for `Corpus.counts`."""
        del corpus
        return ()

    @property
    def rows_depend_on(self) -> Any:
        """What of its keys `training_rows` depends on, in plain data: all, where nobody says."""
        return asdict(self)

    @abstractmethod
    def validation_rows(
        self, data: TrainingData, config: DataConfig, examples: int, length_multiple: int
    ) -> Rows:
        """Rows of a fixed sample of held-out examples.

        Args:
          examples: how many at most.
          length_multiple: tensor-parallel devices divide a row's positions: fill them up to this.
        """

    @abstractmethod
    def loss_sums(
        self, model: nnx.Module, batch: Rows, rows: Lookup, key: jax.Array | None
    ) -> dict[str, jax.Array]:
        """Sums over a batch: `loss` and the `count` to divide it by, and whatever is reported.

        Args:
          rows: the memory's rows at the model's addresses, float32 [..., width]; empty without a
            table.
          key: of this step, for dropout and sampling; None where nothing may be random, as in
            validation.
        """

    def moved(
        self, params: dict[str, Any], sums: dict[str, Any], step: jax.Array, key: jax.Array
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """What a step makes of the parts that no gradient moves, such as moving averages.

        Args:
          params: after the optimizer's update.
          sums: `loss_sums` of the whole batch.
          step: updates before this one; key: of this step, for what is random.

        Returns:
          The `moved_parts`, and those of the sums that are reported.
        """
        del params, step, key
        return {}, sums

    @abstractmethod
    def summarize(self, sums: dict[str, Any], prefix: str = "") -> dict[str, float]:
        """What is logged of (host) sums, by name; `{prefix}loss` is among it."""
