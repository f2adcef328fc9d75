"""Vectors of tokens that a pre-trained vocabulary lacks.

A new vector is the vocabulary's mean plus `NOISE` times its standard deviation of each dimension
times a *direction*: near what the model knows, and apart from each other. Directions are noise, or,
where the quantiser is known, code centroids, so that codes that mean alike start alike.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from prefixmem_jax.errors import UserError
from prefixmem_jax.semantic_ids.space import SidSpace
from prefixmem_jax.semantic_ids.vocabulary import Vocabulary

NOISE = 0.1


def read_codebooks(path: str | Path, space: SidSpace) -> list[np.ndarray]:
    """The quantiser's centroids by level, [codes, width] each.

    Args:
      path: .npz with arrays `level_1`, `level_2`, ...

    Raises:
      UserError: not such a file, or other codebooks than the SIDs have.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays: Mapping[str, np.ndarray] = {name: file[name] for name in file.files}
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(f"{path}: not an .npz file of codebooks ({error})") from None
    names = [f"level_{level}" for level in range(1, space.levels + 1)]
    missing = [name for name in names if name not in arrays]
    if missing:
        raise UserError(f"{path}: no array {missing[0]}; it has {', '.join(arrays) or 'none'}")
    codebooks = [np.asarray(arrays[name], np.float32) for name in names]
    for name, centroids, size in zip(names, codebooks, space.codebook_sizes, strict=True):
        expected = (size, codebooks[0].shape[-1])
        if centroids.shape != expected or not np.isfinite(centroids).all():
            raise UserError(f"{path}: {name} has shape {centroids.shape}, expected {expected}")
    return codebooks


def directions(
    first: int,
    d_model: int,
    vocabulary: Vocabulary,
    seed: int,
    codebooks: list[np.ndarray] | None = None,
) -> np.ndarray:
    """Directions of every token from `first` on: float32 [tokens, d_model], unit variance.

    Centroids go through one random projection for all levels, since a residual quantiser's codes
    lie in one space; each level is standardised, since its residuals get smaller level by level.
    """
    rng = np.random.default_rng(seed)
    every = np.zeros((vocabulary.size, d_model), np.float32)
    every[first:] = rng.normal(size=every[first:].shape)
    if codebooks is not None:
        projection = rng.normal(size=(codebooks[0].shape[1], d_model)).astype(np.float32)
        for level, centroids in enumerate(codebooks, start=1):
            projected = (centroids - centroids.mean(axis=0)) @ projection
            every[slice(*vocabulary.token_range(level))] = projected / max(projected.std(), 1e-30)
    return every[first:]


def add_tokens(
    known: jax.Array, new_directions: np.ndarray, axis: int, sharding: NamedSharding
) -> jax.Array:
    """A token table with vectors for new tokens after those it has.

    Args:
      known: its tokens along `axis` are on one device, the other axis as in `sharding`.
      new_directions: [new tokens, width], the same on every process.
      sharding: of the result.
    """
    partition = [*sharding.spec, None, None][:2]
    partition[axis] = None
    if axis == 1:
        new_directions = new_directions.T
    new = jax.make_array_from_callback(
        new_directions.shape,
        NamedSharding(sharding.mesh, P(*partition)),
        lambda index: new_directions[index].astype(known.dtype),
    )

    def joined(known: jax.Array, new: jax.Array) -> jax.Array:
        mean = known.mean(axis=axis, keepdims=True)
        spread = known.std(axis=axis, keepdims=True)
        whole = jnp.concatenate([known, mean + NOISE * spread * new], axis=axis)
        return jax.sharding.reshard(whole, sharding)

    with jax.set_mesh(sharding.mesh):
        return jax.jit(joined)(known, new)
