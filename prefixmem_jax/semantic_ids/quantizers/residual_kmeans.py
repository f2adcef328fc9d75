"""Residual k-means: each level's codes are clusters of what the levels before left over."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import jax
import numpy as np
from jax.sharding import Mesh
from pydantic import NonNegativeInt, PositiveInt

from prefixmem_jax.config_groups import Share
from prefixmem_jax.errors import UserError
from prefixmem_jax.progress import progress_bar
from prefixmem_jax.semantic_ids.clustering import assign, plus_plus, revive
from prefixmem_jax.semantic_ids.quantizers.quantizer import (
    Fitted,
    Fitting,
    Quantizer,
    level_name,
)
from prefixmem_jax.semantic_ids.residuals import (
    last_level_distances,
    residual_codes,
    residual_sum,
)
from prefixmem_jax.semantic_ids.vectors import Vectors

# Vectors for each code among which k-means++ looks for the first centroids.
CANDIDATES = 16
# Numbers that are kept in memory: 1 GB.
KEPT = 1 << 28


@dataclass(frozen=True)
class ResidualKMeans(Quantizer):
    """K-means level by level.

    Attributes:
      iterations: passes over the vectors, for each level.
      points: vectors for each code that codes are fitted to, drawn at random; 0: all there are.
      init: what the first centroids are: vectors far from each other, or any.
      update: of centroids: after each pass (Lloyd's), or after each piece of one (mini-batch).
      balance: how evenly codes are used. In the first half of the passes, codes with less than this
        share of an even spread are put beside those with the most; 0: only those that have none.
    """

    iterations: PositiveInt = 25
    points: NonNegativeInt = 256
    init: Literal["k-means++", "sample"] = "k-means++"
    update: Literal["pass", "piece"] = "pass"
    balance: Share = 0.0

    def fit(self, vectors: Vectors, fitting: Fitting) -> Fitted:
        sample, saved = self._sample(vectors), fitting.saved
        done = {name: array for name, array in saved.items() if name.startswith("level_")}
        residuals = _Residuals(self, sample, fitting.mesh)
        for level in range(len(done)):
            residuals.take_off(done[level_name(level)], level)
        passes = int(saved.get("passes", 0))
        with progress_bar(
            self.levels * self.iterations, self.name, "round", len(done) * self.iterations + passes
        ) as bar:
            for level in range(len(done), self.levels):
                centroids = saved["centroids"] if passes else self._first(residuals, level)
                for number in range(passes, self.iterations):
                    centroids = self._pass(residuals, centroids, level, number)
                    state = {"centroids": centroids, "passes": np.array(number + 1)}
                    fitting.save(done | state)
                    bar.update()
                passes = 0
                done[level_name(level)] = centroids
                residuals.take_off(centroids, level)
        return done

    def encode(self, fitted: Fitted, vectors: np.ndarray, mesh: Mesh) -> np.ndarray:
        return residual_codes(self.codebooks(fitted), vectors, mesh)

    def decode(self, fitted: Fitted, codes: np.ndarray) -> np.ndarray:
        return residual_sum(self.codebooks(fitted), codes)

    def last_distances(self, fitted: Fitted, vectors: np.ndarray, codes: np.ndarray) -> np.ndarray:
        return last_level_distances(self.codebooks(fitted), vectors, codes)

    def _sample(self, vectors: Vectors) -> Vectors:
        """What codes are fitted to."""
        most = max(self.codes)
        if vectors.count < most:
            raise UserError(
                f"{vectors.name}: {vectors.count} vectors for {most} codes; expected at least one "
                "for each code of a level"
            )
        if not self.points or self.points * most >= vectors.count:
            return vectors
        rng = np.random.default_rng(self.seed)
        picked = np.sort(rng.choice(vectors.count, self.points * most, replace=False))
        return Vectors(vectors.take(picked), None, vectors.name)

    def _first(self, residuals: _Residuals, level: int) -> np.ndarray:
        """Where a level's centroids start."""
        rng, count = np.random.default_rng((self.seed, level)), self.codes[level]
        among = count * CANDIDATES if self.init == "k-means++" else count
        among = min(among, residuals.sample.count)
        found = residuals.take(np.sort(rng.choice(residuals.sample.count, among, replace=False)))
        return found if self.init == "sample" else plus_plus(found, count, int(rng.integers(2**31)))

    def _pass(
        self, residuals: _Residuals, centroids: np.ndarray, level: int, number: int
    ) -> np.ndarray:
        """Centroids after one more pass over the vectors."""
        counts = np.zeros(len(centroids), np.int64)
        sums = np.zeros(centroids.shape, np.float64)
        means = centroids
        for piece in residuals.pieces():
            found = assign(piece, means, residuals.mesh)
            counts, sums = counts + found.counts, sums + found.sums
            if self.update == "piece":
                means = _means(centroids, counts, sums)
        means = _means(centroids, counts, sums)
        least = self.balance * counts.mean() if 2 * number < self.iterations else 0.0
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(self.seed), level), number)
        return np.asarray(revive(means, counts.astype(np.float32), key, least))


class _Residuals:
    """What the levels so far leave over of some vectors: kept where it is little, else made anew
    from their codes whenever it is wanted.
    """

    def __init__(self, config: ResidualKMeans, sample: Vectors, mesh: Mesh):
        self.sample, self.mesh = sample, mesh
        self.codes = np.zeros((sample.count, config.levels), np.int32)
        self.levels: list[np.ndarray] = []
        self.kept = None
        if sample.count * sample.width <= KEPT:
            self.kept = sample.take(np.arange(sample.count))

    def take_off(self, centroids: np.ndarray, level: int) -> None:
        """One more level."""
        at = 0
        for piece in self.pieces():
            found = assign(piece, centroids, self.mesh)
            self.codes[at : at + len(piece), level] = found.codes
            if self.kept is not None:
                self.kept[at : at + len(piece)] -= centroids[found.codes]
            at += len(piece)
        self.levels.append(centroids)

    def take(self, items: np.ndarray) -> np.ndarray:
        if self.kept is not None:
            return self.kept[items]
        return self._less(self.sample.take(items), self.codes[items])

    def pieces(self) -> Iterator[np.ndarray]:
        if self.kept is not None:
            yield from (self.kept[items] for items in self.sample.slices())
            return
        for items, piece in self.sample.pieces():
            yield self._less(piece, self.codes[items])

    def _less(self, vectors: np.ndarray, codes: np.ndarray) -> np.ndarray:
        for level, centroids in enumerate(self.levels):
            vectors = vectors - centroids[codes[:, level]]
        return vectors


def _means(before: np.ndarray, counts: np.ndarray, sums: np.ndarray) -> np.ndarray:
    """Centroids; where there are no vectors, the one from before."""
    means = sums / np.maximum(counts, 1)[:, None]
    return np.where((counts > 0)[:, None], means, before).astype(np.float32)
