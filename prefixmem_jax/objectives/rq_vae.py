"""RQ-VAE (Lee et al. 2022, TIGER): what `prefixmem sids ... quantizer=rq_vae` trains.

It starts as residual k-means. Encoder and decoder are a projection on the principal components
and back, to which networks add what begins as zero; the codebooks are those of k-means. Training
then changes all three, so that more of the vectors comes back: the networks by their gradient, the
codebooks as moving averages of what is nearest to them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from pydantic import NonNegativeFloat, PositiveInt

from prefixmem_jax.config_groups import DataConfig, Rate
from prefixmem_jax.data.documents.document import Corpus
from prefixmem_jax.data.item_vectors import ItemVectors, VectorBatch
from prefixmem_jax.data.prepare import TrainingData, fixed_sample
from prefixmem_jax.errors import UserError
from prefixmem_jax.memory.table import Lookup
from prefixmem_jax.models.rq_autoencoder import RqAutoencoder
from prefixmem_jax.objectives.objective import Objective
from prefixmem_jax.semantic_ids.clustering import revive
from prefixmem_jax.semantic_ids.quantizers.quantizer import Fitting, level_name
from prefixmem_jax.semantic_ids.quantizers.residual_kmeans import ResidualKMeans
from prefixmem_jax.semantic_ids.quantizers.rq_vae import Hidden, scaled
from prefixmem_jax.semantic_ids.vectors import PIECE, Vectors
from prefixmem_jax.semantic_ids.vocabulary import Vocabulary

# Steps between two looks for codes that nothing is nearest to.
ROUND = 100
# Passes of k-means, which training goes on from.
START = 10
# The start is computed from at least so many vectors, if there are, a piece at a time: of all of
# them only the projections are in memory.
SAMPLE = 100_000
# A code with fewer vectors in a batch than this, on average, is one that nothing is nearest to.
RARE = 1e-3


@dataclass(frozen=True)
class RqVae(Objective):
    """Brings vectors back from the codes that `data.codebook_sizes` allows.

    Its keys but `width`, the numbers of a vector, are those of the quantizer that it trains
    (`semantic_ids/quantizers/rq_vae.py`), which alone has defaults for them.
    """

    width: PositiveInt
    latent: PositiveInt
    hidden: Hidden
    commitment: NonNegativeFloat
    decay: Rate
    unit: ClassVar[str] = "vectors"
    moved_parts: ClassVar[tuple[str, ...]] = ("scaling", "codebooks", "counts")

    def prepare(self, config: DataConfig) -> TrainingData:
        raise UserError(
            "objective=rq_vae learns from items' vectors; expected to be trained by `prefixmem "
            "sids ... quantizer=rq_vae`, which has them"
        )

    def build_model(self, config: Any, vocabulary: Vocabulary, rngs: nnx.Rngs) -> RqAutoencoder:
        codes = vocabulary.space.codebook_sizes
        return RqAutoencoder(self.width, self.latent, self.hidden, codes, rngs)

    def first_values(self, config: Any, data: ItemVectors, mesh: Mesh) -> dict[str, Any]:
        """Principal components, and the codebooks of k-means on them."""
        vectors, codes = data.vectors, data.vocabulary.space.codebook_sizes
        rng = np.random.default_rng(config.seed)
        most = max(SAMPLE, 256 * max(codes))
        picked = np.sort(rng.permutation(vectors.count)[:most])

        def pieces() -> Iterator[np.ndarray]:
            size = max(PIECE // vectors.width, 1)
            for first in range(0, len(picked), size):
                yield vectors.take(picked[first : first + size]).astype(np.float64)

        mean = sum(piece.sum(axis=0) for piece in pieces()) / len(picked)
        square = sum(((piece - mean) ** 2).sum() for piece in pieces()) / len(picked)
        scale = np.sqrt(square / vectors.width) or 1.0
        scaling = {"mean": np.float32(mean), "scale": np.float32(scale)}
        products = sum(piece.T @ piece for piece in (scaled(scaling, x) for x in pieces()))
        _, components = np.linalg.eigh(products)
        components_DZ = components[:, ::-1][:, : self.latent].astype(np.float32)
        latents = np.concatenate(
            [np.float32(scaled(scaling, piece) @ components_DZ) for piece in pieces()]
        )
        kmeans = ResidualKMeans(codes=codes, seed=config.seed, iterations=START)
        fitted = kmeans.fit(Vectors(latents, None, vectors.name), Fitting(mesh))
        share = config.data.batch_size / len(latents)
        found = kmeans.encode(fitted, latents, mesh)
        counts = {
            level_name(level): (np.bincount(found[:, level], minlength=size) * share)
            for level, size in enumerate(codes)
        }
        return {
            "scaling": scaling,
            "encoder": {"project": components_DZ},
            "decoder": {"project": components_DZ.T},
            "codebooks": fitted,
            "counts": counts,
        }

    def abstract_batch(
        self, data: DataConfig, sharding: jax.sharding.Sharding | None = None
    ) -> VectorBatch:
        return VectorBatch.abstract(data.batch_size, self.width, sharding)

    def training_rows(self, corpus: Corpus, seed: int) -> VectorBatch:
        """All vectors, where they are: batches are read as they are drawn."""
        vectors = corpus.data.vectors
        return VectorBatch(np.broadcast_to(np.float32(1), vectors.count), vectors)

    def validation_rows(
        self, data: ItemVectors, config: DataConfig, examples: int, length_multiple: int
    ) -> VectorBatch:
        """Some of the vectors that it learns from: those are what the codes are for."""
        sample = data.vectors.take(fixed_sample(data.vectors.count, examples))
        return VectorBatch(np.ones(len(sample), np.float32), sample)

    def loss_sums(
        self, model: RqAutoencoder, batch: VectorBatch, rows: Lookup, key: jax.Array | None
    ) -> dict[str, Any]:
        """What does not come back, by numbers of the vectors, whose variance is 1.

        Returns:
          loss, lost (without what the encoder commits to), count: float32 [].
          counts and sums by level, in training: what codebooks are averages of.
        """
        found = model(batch.vectors)
        lost, committed = (jnp.sum(batch.weights * x) for x in (found.lost, found.committed))
        sums = {
            "loss": lost + self.commitment * committed,
            "lost": lost,
            "count": jnp.sum(batch.weights) * self.width,
        }
        if key is not None:
            sums |= {"counts": found.counts, "sums": found.sums}
        return sums

    def moved(
        self, params: dict[str, Any], sums: dict[str, Any], step: jax.Array, key: jax.Array
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """The codebooks as moving averages; now and then, codes that nothing is nearest to beside
        those of most vectors.
        """
        counts, codebooks, rate = {}, {}, 1 - self.decay
        for number, (level, codebook_KZ) in enumerate(params["codebooks"].items()):
            in_batch_K = sums["counts"][level]
            count_K = self.decay * params["counts"][level] + rate * in_batch_K
            towards_KZ = sums["sums"][level] - in_batch_K[:, None] * codebook_KZ
            moved_KZ = codebook_KZ + rate * towards_KZ / jnp.maximum(count_K, 1e-9)[:, None]
            codebooks[level], counts[level] = jax.lax.cond(
                (step % ROUND == 0) & (step > 0),
                _revived,
                lambda codebook_KZ, count_K, key: (codebook_KZ, count_K),
                *(moved_KZ, count_K, jax.random.fold_in(key, number)),
            )
        parts = {"scaling": params["scaling"], "codebooks": codebooks, "counts": counts}
        return parts, {name: value for name, value in sums.items() if name != "sums"}

    def summarize(self, sums: dict[str, Any], prefix: str = "") -> dict[str, float]:
        """Loss, the share of the variance that does not come back, and in training as how many even
        ones a level's codes were used in the batch.
        """
        count = max(float(sums["count"]), 1.0)
        summary = {
            f"{prefix}loss": float(sums["loss"]) / count,
            f"{prefix}reconstruction_error": float(sums["lost"]) / count,
        }
        for level, counts in sums.get("counts", {}).items():
            shares = np.asarray(counts)[np.asarray(counts) > 0] / np.sum(counts)
            summary[f"{prefix}perplexity/{level}"] = float(np.exp(-np.sum(shares * np.log(shares))))
        return summary


def _revived(
    codebook_KZ: jax.Array, count_K: jax.Array, key: jax.Array
) -> tuple[jax.Array, jax.Array]:
    rare_K = count_K < RARE
    codebook_KZ = revive(codebook_KZ, jnp.where(rare_K, 0, count_K), key)
    # One vector's worth, so that the first that comes decides where it is.
    return codebook_KZ, jnp.where(rare_K, 1, count_K)
