"""RQ-VAE: residual quantisation of what an encoder makes of vectors (Lee et al. 2022, TIGER).

Its networks and codebooks are learnt by a training run like any other (`objectives/rq_vae.py`).
Here is what they are used for once they are learnt.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

import jax
import numpy as np
from jax.sharding import Mesh
from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt

from prefixmem_jax.config_groups import Rate
from prefixmem_jax.errors import UserError
from prefixmem_jax.semantic_ids.clustering import exactly
from prefixmem_jax.semantic_ids.quantizers.quantizer import Fitted, Fitting, Quantizer
from prefixmem_jax.semantic_ids.residuals import (
    last_level_distances,
    residual_codes,
    residual_sum,
)
from prefixmem_jax.semantic_ids.vectors import Vectors

Hidden = Annotated[tuple[PositiveInt, ...], Field(min_length=1)]


@dataclass(frozen=True)
class RqVae(Quantizer):
    """A residual-quantised autoencoder.

    Attributes:
      latent: numbers that are quantised; none means as many as the vectors have.
      hidden: widths of the layers of the encoder's network; the decoder's are the same backwards.
      steps: of `batch_size` vectors.
      learning_rate: Adam's at its peak; it warms up, and falls to nothing along a cosine.
      commitment: weight of the distance between what the encoder says and its codes.
      decay: of the moving averages that the codebooks are.
    """

    latent: PositiveInt | None = None
    hidden: Hidden = (512,)
    steps: PositiveInt = 2000
    batch_size: PositiveInt = 1024
    learning_rate: PositiveFloat = 3e-3
    commitment: NonNegativeFloat = 0.25
    decay: Rate = 0.99

    def fit(self, vectors: Vectors, fitting: Fitting) -> Fitted:
        latent = self.latent or vectors.width
        if latent > vectors.width:
            raise UserError(
                f"quantizer.latent={latent}: the vectors have {vectors.width} numbers; expected no "
                "more than those"
            )
        parts = fitting.train(
            {
                "name": self.name,
                "objective": {
                    "kind": "rq_vae",
                    "width": vectors.width,
                    "latent": latent,
                    "hidden": self.hidden,
                    "commitment": self.commitment,
                    "decay": self.decay,
                },
                "steps": self.steps,
                "seed": self.seed,
                "data": {"codebook_sizes": self.codes, "batch_size": self.batch_size},
                "optimizer": {
                    "learning_rate": self.learning_rate,
                    "warmup_steps": max(self.steps // 20, 1),
                    "final_rate": 0.0,
                    "beta2": 0.999,
                    "weight_decay": 0.0,
                },
            }
        )
        networks = {
            f"{part}.{name}": array
            for part in ("encoder", "decoder")
            for name, array in parts[part].items()
        }
        return {**parts["scaling"], **networks, **parts["codebooks"]}

    def width(self, fitted: Fitted) -> int:
        return len(fitted["mean"])

    def encode(self, fitted: Fitted, vectors: np.ndarray, mesh: Mesh) -> np.ndarray:
        return residual_codes(self.codebooks(fitted), _latents(fitted, vectors), mesh)

    def decode(self, fitted: Fitted, codes: np.ndarray) -> np.ndarray:
        said = network(_part(fitted, "decoder"), residual_sum(self.codebooks(fitted), codes))
        return np.asarray(said) * fitted["scale"] + fitted["mean"]

    def last_distances(self, fitted: Fitted, vectors: np.ndarray, codes: np.ndarray) -> np.ndarray:
        return last_level_distances(self.codebooks(fitted), _latents(fitted, vectors), codes)


def network(weights: Mapping[str, Any], vectors: Any) -> jax.Array:
    """A projection of vectors [N, any], and what layers add to it.

    Args:
      weights: `project`, and of each layer `kernel_0`, `bias_0`, ...
    """
    added, layers = vectors, (len(weights) - 1) // 2
    for number in range(layers):
        added = exactly(added, weights[f"kernel_{number}"]) + weights[f"bias_{number}"]
        if number < layers - 1:
            added = jax.nn.gelu(added)
    return exactly(vectors, weights["project"]) + added


def scaled(scaling: Mapping[str, Any], vectors: Any) -> Any:
    """Vectors to zero mean and unit variance, by `mean` and the same `scale` for all numbers."""
    return (vectors - scaling["mean"]) / scaling["scale"]


def _latents(fitted: Fitted, vectors: np.ndarray) -> np.ndarray:
    return np.asarray(network(_part(fitted, "encoder"), scaled(fitted, vectors)))


def _part(fitted: Fitted, name: str) -> dict[str, np.ndarray]:
    """The weights of `encoder` or `decoder`."""
    prefix = f"{name}."
    return {key.removeprefix(prefix): x for key, x in fitted.items() if key.startswith(prefix)}
