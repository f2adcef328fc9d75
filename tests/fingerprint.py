"""The next-token objective, which logs a number by which a batch's rows are known, in whatever order."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from prefixmem_jax.data.batch import Batch
from prefixmem_jax.memory.table import Lookup
from prefixmem_jax.objectives.next_token import NextToken


def of_rows(tokens: np.ndarray | jax.Array) -> int | jax.Array:
    """The sum over rows, modulo 2^32, of a hash of their tokens; of host arrays an int."""
    on_host = isinstance(tokens, np.ndarray)
    numpy = np if on_host else jnp
    places = numpy.arange(1, tokens.shape[1] + 1, dtype=numpy.uint32) * numpy.uint32(2654435761)
    mixed = (tokens.astype(numpy.uint32) + 1) * places
    # A row's sum is not that of other tokens, nor that of rows a sum of tokens.
    mixed = numpy.sum(_scrambled(mixed), axis=1, dtype=numpy.uint32)
    mixed = _scrambled(mixed)
    total = numpy.sum(mixed, dtype=numpy.uint32)
    return int(total) if on_host else total


def _scrambled(numbers: np.ndarray | jax.Array) -> np.ndarray | jax.Array:
    return (numbers ^ (numbers >> 15)) * np.uint32(2246822519)


@dataclass(frozen=True)
class Fingerprint(NextToken):
    """Logs `batch` too."""

    def loss_sums(
        self, model: nnx.Module, batch: Batch, rows: Lookup, key: jax.Array | None
    ) -> dict[str, jax.Array]:
        sums = super().loss_sums(model, batch, rows, key)
        return sums if key is None else sums | {"batch": of_rows(batch.tokens)}

    def summarize(self, sums: dict[str, Any], prefix: str = "") -> dict[str, float]:
        seen = {"batch": int(sums["batch"])} if "batch" in sums else {}
        return super().summarize(sums, prefix) | seen
