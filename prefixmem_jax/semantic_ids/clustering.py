"""K-means on all devices: one pass at a time over vectors that need not fit in memory."""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

# Scores of so many vectors against all centroids stay in a core's cache.
SCORED = 1 << 20


def exactly(vectors: jax.Array, other: jax.Array) -> jax.Array:
    """Their product in float32 on accelerators too, which round by themselves: an item must get the
    same code everywhere.
    """
    return jnp.matmul(vectors, other, precision="highest")


class Assigned(NamedTuple):
    """Vectors and their nearest centroids.

    Attributes:
      codes: int32 [N].
      error: sum of the squared distances.
      counts: vectors of each centroid, int64 [K].
      sums: of these vectors, float64 [K, D].
    """

    codes: np.ndarray
    error: float
    counts: np.ndarray
    sums: np.ndarray


def assign(vectors: np.ndarray, centroids: np.ndarray, mesh: Mesh) -> Assigned:
    """The nearest centroid [K, D] of every vector [N, D]; float32 both."""
    devices, count = mesh.devices.size, len(vectors)
    # A few sizes, so that few programs are compiled.
    size = devices * (1 << max(int(np.ceil(np.log2(max(count, 1) / devices))), 0))
    padded = vectors
    if count < size:
        padded = np.zeros((size, vectors.shape[1]), np.float32)
        padded[:count] = vectors
    everywhere = NamedSharding(mesh, P())
    codes, errors, counts, sums = _assign(
        jax.device_put(padded, NamedSharding(mesh, P(mesh.axis_names))),
        jax.device_put(np.int32(count), everywhere),
        jax.device_put(centroids, everywhere),
        mesh,
    )
    return Assigned(
        np.asarray(codes)[:count],
        float(np.asarray(errors).sum(dtype=np.float64)),
        np.asarray(counts).astype(np.int64),
        np.asarray(sums).astype(np.float64),
    )


@partial(jax.jit, static_argnames="mesh")
def _assign(
    vectors_ND: jax.Array, count: jax.Array, centroids_KD: jax.Array, mesh: Mesh
) -> tuple[jax.Array, ...]:
    axes = mesh.axis_names

    def one_device(
        vectors_ND: jax.Array, count: jax.Array, centroids_KD: jax.Array
    ) -> tuple[jax.Array, ...]:
        first = jax.lax.axis_index(axes) * len(vectors_ND)
        codes_N, errors, counts_K, sums_KD = nearest(vectors_ND, count - first, centroids_KD)
        return codes_N, errors[None], jax.lax.psum(counts_K, axes), jax.lax.psum(sums_KD, axes)

    return jax.shard_map(
        one_device,
        mesh=mesh,
        in_specs=(P(axes), P(), P()),
        out_specs=(P(axes), P(axes), P(), P()),
    )(vectors_ND, count, centroids_KD)


def nearest(
    vectors_ND: jax.Array, count: jax.Array, centroids_KD: jax.Array
) -> tuple[jax.Array, ...]:
    """Of the first `count` vectors: codes, summed error, vectors by centroid and their sums.

    Traceable, on one device's vectors.
    """
    size, centroids = len(vectors_ND), len(centroids_KD)
    piece = min(max(SCORED // centroids, 1), size)
    while size % piece:
        piece -= 1
    norms_K = jnp.sum(centroids_KD**2, axis=1)
    index_K = jnp.arange(centroids, dtype=jnp.int32)

    def one_piece(vectors_BD: jax.Array) -> tuple[jax.Array, jax.Array]:
        # Squared distance but for the vector's own part.
        nearness_BK = norms_K - 2 * exactly(vectors_BD, centroids_KD.T)
        best_B = jnp.min(nearness_BK, axis=1)
        # Not argmin, which no CPU does many at a time.
        code_B = jnp.min(jnp.where(nearness_BK == best_B[:, None], index_K, centroids), axis=1)
        return code_B, jnp.maximum(best_B + jnp.sum(vectors_BD**2, axis=1), 0)

    pieces = vectors_ND.reshape(size // piece, piece, -1)
    codes_N, errors_N = (x.reshape(size) for x in jax.lax.map(one_piece, pieces))
    there_N = jnp.arange(size) < count
    kept_N = jnp.where(there_N, codes_N, centroids)
    sums_KD = jax.ops.segment_sum(vectors_ND, kept_N, centroids + 1)[:centroids]
    counts_K = jax.ops.segment_sum(jnp.ones_like(kept_N), kept_N, centroids + 1)[:centroids]
    return codes_N, jnp.sum(errors_N * there_N), counts_K, sums_KD


def plus_plus(vectors: np.ndarray, count: int, seed: int) -> np.ndarray:
    """First centroids, float32 [count, D]: k-means++, each far from those before.

    Args:
      vectors: float32 [at least count, D]; all of them are compared `count` times.
    """
    picked = _plus_plus(vectors, jax.random.key(seed), count)
    return vectors[np.asarray(picked)]


@partial(jax.jit, static_argnames="count")
def _plus_plus(vectors_ND: jax.Array, key: jax.Array, count: int) -> jax.Array:
    squares_N = jnp.sum(vectors_ND**2, axis=1)

    def nearer(distance_N: jax.Array, index: jax.Array) -> jax.Array:
        picked_D = vectors_ND[index]
        to_it_N = squares_N + jnp.sum(picked_D**2) - 2 * exactly(vectors_ND, picked_D)
        return jnp.minimum(distance_N, jnp.maximum(to_it_N, 0)).at[index].set(0.0)

    def step(distance_N: jax.Array, key: jax.Array) -> tuple[jax.Array, jax.Array]:
        # Where all that are left are picked already, any will do.
        chances_N = jnp.where(jnp.any(distance_N > 0), distance_N, 1.0)
        upto_N = jnp.cumsum(chances_N)
        index = jnp.searchsorted(upto_N, jax.random.uniform(key) * upto_N[-1], side="right")
        index = jnp.minimum(index, len(vectors_ND) - 1)
        return nearer(distance_N, index), index

    keys = jax.random.split(key, count)
    first = jax.random.randint(keys[0], (), 0, len(vectors_ND))
    distance_N = nearer(jnp.full(len(vectors_ND), jnp.inf), first)
    _, others = jax.lax.scan(step, distance_N, keys[1:])
    return jnp.concatenate([first[None], others])


@jax.jit
def revive(
    centroids_KD: jax.Array, counts_K: jax.Array, key: jax.Array, least: float = 0.0
) -> jax.Array:
    """Centroids, those of small clusters put beside the largest clusters' ones.

    Args:
      counts_K: vectors of each cluster.
      least: clusters of no more than so many are small, if half of the largest is more than that.
    """
    order_K, small = jnp.argsort(counts_K), jnp.sum(counts_K <= least)

    def is_left(state: tuple) -> jax.Array:
        number, _, counts_K = state
        return (number < small) & (jnp.max(counts_K) / 2 > counts_K[order_K[number]])

    def put_beside(state: tuple) -> tuple:
        number, centroids_KD, counts_K = state
        code, largest = order_K[number], jnp.argmax(counts_K)
        there_D, half = centroids_KD[largest], counts_K[largest] / 2
        noise_D = jax.random.normal(jax.random.fold_in(key, number), there_D.shape)
        apart_D = 1e-3 * noise_D * jnp.mean(jnp.abs(there_D))
        centroids_KD = centroids_KD.at[code].set(there_D + apart_D).at[largest].add(-apart_D)
        return number + 1, centroids_KD, counts_K.at[code].set(half).at[largest].set(half)

    first = jnp.int32(0), centroids_KD, counts_K.astype(jnp.float32)
    return jax.lax.while_loop(is_left, put_beside, first)[1]
