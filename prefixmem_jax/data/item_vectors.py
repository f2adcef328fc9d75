"""Vectors of items as what a training learns from, in place of histories."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp

from prefixmem_jax.data.batch import Array
from prefixmem_jax.data.prepare import DataFacts
from prefixmem_jax.semantic_ids.vectors import Vectors
from prefixmem_jax.semantic_ids.vocabulary import Vocabulary


class VectorBatch(NamedTuple):
    """Vectors; a pytree of arrays with a row for each.

    Attributes:
      weights: float32 [rows], 1; 0 where a batch is filled up.
      vectors: float32 [rows, width].
    """

    weights: Array
    vectors: Array

    @classmethod
    def abstract(
        cls, rows: int, width: int, sharding: jax.sharding.Sharding | None = None
    ) -> VectorBatch:
        """Shapes and dtypes."""
        return cls(
            jax.ShapeDtypeStruct((rows,), jnp.float32, sharding=sharding),
            jax.ShapeDtypeStruct((rows, width), jnp.float32, sharding=sharding),
        )


@dataclass(frozen=True)
class ItemVectors:
    """Vectors, maybe in a file, and the tokens of the SIDs that items are to get."""

    vectors: Vectors
    vocabulary: Vocabulary

    @property
    def facts(self) -> DataFacts:
        digest = self.vectors.sha256
        return DataFacts(self.vectors.name, digest, digest, self.vectors.count, 0)
