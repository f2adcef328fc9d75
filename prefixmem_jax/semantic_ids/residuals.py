"""Codes level by level: each is the centroid nearest to what the levels before left over."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jax.sharding import Mesh

from prefixmem_jax.semantic_ids.clustering import assign


def residual_codes(codebooks: Sequence[np.ndarray], vectors: np.ndarray, mesh: Mesh) -> np.ndarray:
    """Codes int32 [N, levels] of vectors float32 [N, width], by codebooks [codes, width]."""
    codes = np.empty((len(vectors), len(codebooks)), np.int32)
    for level, centroids in enumerate(codebooks):
        codes[:, level] = assign(vectors, centroids, mesh).codes
        vectors = vectors - centroids[codes[:, level]]
    return codes


def residual_sum(codebooks: Sequence[np.ndarray], codes: np.ndarray) -> np.ndarray:
    """What codes [N, any levels] stand for: float32 [N, width]."""
    return sum(codebooks[level][at] for level, at in enumerate(codes.T))


def last_level_distances(
    codebooks: Sequence[np.ndarray], vectors: np.ndarray, codes: np.ndarray
) -> np.ndarray:
    """How far each code of the last level is after the codes before it: float32 [N, codes]."""
    if len(codebooks) > 1:
        vectors = vectors - residual_sum(codebooks, codes[:, :-1])
    centroids = codebooks[-1]
    squares = (vectors**2).sum(axis=1)[:, None] + (centroids**2).sum(axis=1)
    return np.maximum(squares - 2 * vectors @ centroids.T, 0)
