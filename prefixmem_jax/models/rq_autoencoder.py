"""RQ-VAE's model: an encoder, codebooks by level, and a decoder of what the codes add up to."""

from __future__ import annotations

import itertools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from prefixmem_jax.parallel.parameters import normal, parameter
from prefixmem_jax.parallel.sharding import by_rows, take
from prefixmem_jax.semantic_ids.clustering import nearest
from prefixmem_jax.semantic_ids.quantizers.quantizer import level_name
from prefixmem_jax.semantic_ids.quantizers.rq_vae import network, scaled


class Reconstruction(NamedTuple):
    """What becomes of vectors [B, D].

    Attributes:
      lost: squared distance to what comes back, of the scaled vectors, float32 [B].
      committed: squared distance of what each level leaves over, summed over levels, float32 [B].
      counts: by level, how many latents are nearest to each code, float32 [K].
      sums: by level, of what these were nearest with: latents less the codes before, [K, Z].
    """

    lost: jax.Array
    committed: jax.Array
    counts: dict[str, jax.Array]
    sums: dict[str, jax.Array]


class Scaling(nnx.Module):
    """Brings vectors to zero mean and unit variance, by the same factor for all numbers."""

    def __init__(self, width: int):
        self.mean = parameter(jnp.zeros(width), None)
        self.scale = parameter(jnp.ones(()))


class Network(nnx.Module):
    """What `network` computes; the last layer begins as zero, so that the projection is all."""

    def __init__(self, sizes: tuple[int, ...], rngs: nnx.Rngs):
        first, last = sizes[0], sizes[-1]
        self.project = normal(rngs, first**-0.5, (first, None), (last, None))
        for number, (rows, columns) in enumerate(itertools.pairwise(sizes)):
            std = 0.0 if number == len(sizes) - 2 else (2 / rows) ** 0.5
            setattr(self, f"kernel_{number}", normal(rngs, std, (rows, None), (columns, None)))
            setattr(self, f"bias_{number}", parameter(jnp.zeros(columns), None))

    def __call__(self, vectors: jax.Array) -> jax.Array:
        return network(values_of(self), vectors)


class ByLevel(nnx.Module):
    """An array for each level, by its name."""

    def __init__(self, *shapes: tuple[int, ...]):
        for level, shape in enumerate(shapes):
            value = parameter(jnp.ones(shape), *(None,) * len(shape))
            setattr(self, level_name(level), value)


class RqAutoencoder(nnx.Module):
    """Parts: `scaling`, `encoder`, `decoder`, `codebooks`, and `counts`, how many vectors of a
    batch each code is nearest to on average.
    """

    def __init__(
        self,
        width: int,
        latent: int,
        hidden: tuple[int, ...],
        codes: tuple[int, ...],
        rngs: nnx.Rngs,
    ):
        self.scaling = Scaling(width)
        self.encoder = Network((width, *hidden, latent), rngs)
        self.decoder = Network((latent, *hidden[::-1], width), rngs)
        self.codebooks = ByLevel(*((size, latent) for size in codes))
        self.counts = ByLevel(*((size,) for size in codes))

    def __call__(self, vectors_BD: jax.Array) -> Reconstruction:
        codebooks = values_of(self.codebooks)
        wanted_BD = scaled(values_of(self.scaling), vectors_BD)
        latent_BZ = self.encoder(wanted_BD)
        codes_BL, (counts, sums) = by_rows(
            _nearest_by_level, (jax.lax.stop_gradient(latent_BZ),), codebooks
        )
        left_BZ, committed_B = latent_BZ, 0.0
        for level in range(len(codebooks)):
            codebook_KZ = codebooks[level_name(level)]
            left_BZ = left_BZ - take(codebook_KZ, codes_BL[:, level], "batch", None)
            committed_B += jnp.sum(left_BZ**2, axis=1)
        # The codes' sum, with the latent vector's gradient: straight through.
        back_BD = self.decoder(latent_BZ - jax.lax.stop_gradient(left_BZ))
        lost_B = jnp.sum((wanted_BD - back_BD) ** 2, axis=1)
        return Reconstruction(lost_B, committed_B, counts, sums)


def values_of(module: nnx.Module) -> dict[str, jax.Array]:
    """A module's own parameters by name."""
    return nnx.to_pure_dict(nnx.state(module, nnx.Param))


def _nearest_by_level(
    latent_BZ: jax.Array, codebooks: dict[str, jax.Array]
) -> tuple[jax.Array, tuple[dict[str, jax.Array], dict[str, jax.Array]]]:
    """Codes int32 [B, levels], and by level how many have each, and the sums of these."""
    left_BZ, codes, counts, sums = latent_BZ, [], {}, {}
    for level in map(level_name, range(len(codebooks))):  # the dict's order: 1, 10, 2
        codebook_KZ = codebooks[level]
        code_B, _, count_K, sums[level] = nearest(left_BZ, np.int32(len(left_BZ)), codebook_KZ)
        counts[level] = count_K.astype(jnp.float32)
        left_BZ = left_BZ - codebook_KZ[code_B]
        codes.append(code_B)
    return jnp.stack(codes, axis=1), (counts, sums)
