"""What a quantizer is: a config that fits codes to vectors, and what came of it."""

from __future__ import annotations

import abc
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
from jax.sharding import Mesh

from prefixmem_jax.config_groups import Codes, Seed
from prefixmem_jax.kinds import Kind, kind_name
from prefixmem_jax.semantic_ids.vectors import Vectors

# Arrays by name: what was fitted, or how far it has come.
Fitted = dict[str, np.ndarray]
Save = Callable[[Fitted], None]
# Parameters by part of a model, from the keys of the `config.Config` that it is trained by.
Train = Callable[[dict[str, Any]], dict[str, Any]]


def level_name(level: int) -> str:
    """Of a level's centroids, by its number from 0; as `init.codebooks` wants them."""
    return f"level_{level + 1}"


@dataclass(frozen=True)
class Fitting:
    """What a fit has to work with.

    Attributes:
      saved: what an earlier, killed fit saved last; empty for a fresh one.
      save: to be called now and then with all that is needed to go on.
      train: for what gradients find: trains a model on the vectors as any other run is trained, and
        goes on by itself where an earlier one was killed.
    """

    mesh: Mesh
    saved: Fitted = field(default_factory=dict)
    save: Save = lambda state: None
    train: Train | None = None


@dataclass(frozen=True)
class Quantizer(Kind, abc.ABC):
    """Base of the quantizers' configs.

    Attributes:
      codes: how many of each level; one level for each.
    """

    package: ClassVar[str] = "prefixmem_jax.semantic_ids.quantizers"

    codes: tuple[Codes, ...] = (256, 256, 256, 256)
    seed: Seed = 0

    @property
    def levels(self) -> int:
        return len(self.codes)

    @property
    def name(self) -> str:
        return kind_name(type(self))

    def codebooks(self, fitted: Fitted) -> list[np.ndarray]:
        """Centroids by level, float32 [codes, any]."""
        return [fitted[level_name(level)] for level in range(self.levels)]

    def width(self, fitted: Fitted) -> int:
        """Numbers of the vectors that it was fitted to."""
        return fitted[level_name(0)].shape[1]

    @abc.abstractmethod
    def fit(self, vectors: Vectors, fitting: Fitting) -> Fitted:
        """Codes fitted to vectors.

        Returns:
          arrays by name, of which `level_1`, ... are centroids by level, float32 [codes, any].
        """

    @abc.abstractmethod
    def encode(self, fitted: Fitted, vectors: np.ndarray, mesh: Mesh) -> np.ndarray:
        """Codes int32 [N, levels] of vectors float32 [N, width]."""

    @abc.abstractmethod
    def decode(self, fitted: Fitted, codes: np.ndarray) -> np.ndarray:
        """Vectors float32 [N, width] that codes int32 [N, any levels] stand for."""

    @abc.abstractmethod
    def last_distances(self, fitted: Fitted, vectors: np.ndarray, codes: np.ndarray) -> np.ndarray:
        """How far each code of the last level is, float32 [N, codes], after the codes before it.

        Args:
          vectors: float32 [N, width]; codes: their own, int32 [N, levels].
        """
