"""RQ-VAE: residual quantisation of what an encoder makes of vectors (Lee et al. 2022, TIGER).

It starts as residual k-means. Encoder and decoder are a projection on the principal components
and back, to which networks add what begins as zero; the codebooks are those of k-means. Training
then changes all three, so that more of the vectors comes back.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt

from prefixmem_jax.config_groups import Rate
from prefixmem_jax.errors import UserError
from prefixmem_jax.progress import progress_bar
from prefixmem_jax.semantic_ids.clustering import revive
from prefixmem_jax.semantic_ids.quantizers.quantizer import Fitted, Quantizer, Save, level_name
from prefixmem_jax.semantic_ids.quantizers.residual_kmeans import ResidualKMeans
from prefixmem_jax.semantic_ids.residuals import (
    last_level_distances,
    residual_codes,
    residual_sum,
)
from prefixmem_jax.semantic_ids.vectors import Vectors

# Steps between two looks for codes that nothing is nearest to, and between two savings.
ROUND = 100
# Passes of k-means, which training goes on from.
START = 10
# Vectors that the principal components are computed from.
SAMPLE = 100_000
# A code with fewer vectors in a batch than this, on average, is one that nothing is nearest to.
RARE = 1e-3


@dataclass(frozen=True)
class RqVae(Quantizer):
    """A residual-quantised autoencoder.

    Attributes:
      latent: numbers that are quantised; none means as many as the vectors have.
      hidden: widths of the layers of the encoder's network; the decoder's are the same backwards.
      steps: of `batch_size` vectors, drawn at random.
      learning_rate: Adam's at its peak; it warms up, and falls to nothing along a cosine.
      commitment: weight of the distance between what the encoder says and its codes.
      decay: of the moving averages that the codebooks are.
    """

    latent: PositiveInt | None = None
    hidden: Annotated[tuple[PositiveInt, ...], Field(min_length=1)] = (512,)
    steps: PositiveInt = 2000
    batch_size: PositiveInt = 1024
    learning_rate: PositiveFloat = 3e-3
    commitment: NonNegativeFloat = 0.25
    decay: Rate = 0.99

    def fit(self, vectors: Vectors, mesh: Mesh, saved: Fitted, save: Save) -> Fitted:
        state, scaling = self._taken_up(saved) if saved else self._start(vectors, mesh)
        by_device, devices = NamedSharding(mesh, P(mesh.axis_names)), mesh.devices.size
        step = int(state.step)
        with progress_bar(self.steps, self.name, "step", step) as bar:
            while step < self.steps:
                state = jax.device_put(state, NamedSharding(mesh, P()))
                for _ in range(min(ROUND, self.steps - step)):
                    drawn = vectors.take(self._drawn(vectors.count, step, devices))
                    batch = jax.device_put(scaling.apply(drawn), by_device)
                    state = _step(self, state, batch, mesh)
                    step += 1
                    bar.update()
                state = jax.device_get(state)
                if step < self.steps:
                    state = self._revived(state, step)
                    leaves = enumerate(jax.tree.leaves(state))
                    save({**scaling._asdict(), **{f"leaf_{i}": leaf for i, leaf in leaves}})
        weights = {
            f"{part}.{name}": array
            for part, arrays in state.weights.items()
            for name, array in arrays.items()
        }
        codebooks = {level_name(level): x for level, x in enumerate(state.codebooks)}
        return {**scaling._asdict(), **weights, **codebooks}

    def width(self, fitted: Fitted) -> int:
        return len(fitted["mean"])

    def encode(self, fitted: Fitted, vectors: np.ndarray, mesh: Mesh) -> np.ndarray:
        return residual_codes(self.codebooks(fitted), _latents(fitted, vectors), mesh)

    def decode(self, fitted: Fitted, codes: np.ndarray) -> np.ndarray:
        said = _network(_part(fitted, "decoder"), residual_sum(self.codebooks(fitted), codes))
        return _Scaling(fitted["mean"], fitted["scale"]).undo(np.asarray(said))

    def last_distances(self, fitted: Fitted, vectors: np.ndarray, codes: np.ndarray) -> np.ndarray:
        return last_level_distances(self.codebooks(fitted), _latents(fitted, vectors), codes)

    def _drawn(self, count: int, step: int, devices: int) -> np.ndarray:
        """Which vectors a step sees, the same for any number of devices that divides the batch."""
        size = self.batch_size + -self.batch_size % devices
        return np.sort(np.random.default_rng((self.seed, step)).integers(0, count, size))

    def _start(self, vectors: Vectors, mesh: Mesh) -> tuple[_State, _Scaling]:
        """Principal components, networks that add nothing, and the codebooks of k-means."""
        most, rng = max(self.codes), np.random.default_rng(self.seed)
        latent = self.latent or vectors.width
        if latent > vectors.width:
            raise UserError(
                f"quantizer.latent={latent}: the vectors have {vectors.width} numbers; expected no "
                "more than those"
            )
        picked = np.sort(rng.permutation(vectors.count)[: max(SAMPLE, 256 * most)])
        sample = vectors.take(picked)
        mean = sample.mean(axis=0)
        scaling = _Scaling(mean, np.float32(np.sqrt(((sample - mean) ** 2).mean()) or 1.0))
        sample = scaling.apply(sample)
        _, components = np.linalg.eigh(sample.T.astype(np.float64) @ sample)
        components = components[:, ::-1][:, :latent].astype(np.float32)
        weights = self._weights(components)
        kmeans = ResidualKMeans(codes=self.codes, seed=self.seed, iterations=START)
        latents = Vectors(sample @ components, None, vectors.name)
        fitted = kmeans.fit(latents, mesh, {}, lambda state: None)
        codebooks = kmeans.codebooks(fitted)
        codes = kmeans.encode(fitted, sample @ components, mesh)
        share = self.batch_size / len(codes)
        counts = tuple(
            (np.bincount(codes[:, level], minlength=size) * share).astype(np.float32)
            for level, size in enumerate(self.codes)
        )
        return self._state(weights, tuple(codebooks), counts), scaling

    def _weights(self, components: np.ndarray) -> dict[str, Any]:
        """Encoder and decoder; `components` [width, latent] project, and the networks add zero."""
        rng = np.random.default_rng((self.seed, 1))

        def network(project: np.ndarray, hidden: tuple[int, ...]) -> dict[str, np.ndarray]:
            sizes = (project.shape[0], *hidden, project.shape[1])
            arrays = {"project": project}
            for number, (rows, columns) in enumerate(itertools.pairwise(sizes)):
                kernel = rng.standard_normal((rows, columns)) * np.sqrt(2 / rows)
                last = number == len(hidden)
                arrays[f"kernel_{number}"] = (0 * kernel if last else kernel).astype(np.float32)
                arrays[f"bias_{number}"] = np.zeros(columns, np.float32)
            return arrays

        return {
            "encoder": network(components, self.hidden),
            "decoder": network(np.ascontiguousarray(components.T), self.hidden[::-1]),
        }

    def _state(
        self, weights: dict[str, Any], codebooks: tuple[np.ndarray, ...], counts: tuple
    ) -> _State:
        sums = tuple(
            count[:, None] * codebook for count, codebook in zip(counts, codebooks, strict=True)
        )
        adam = jax.device_get(optax.scale_by_adam().init(weights))
        return _State(np.int32(0), weights, adam, codebooks, counts, sums)

    def _taken_up(self, saved: Fitted) -> tuple[_State, _Scaling]:
        """What an earlier fit saved."""
        scaling = _Scaling(saved["mean"], saved["scale"])
        latent = self.latent or len(scaling.mean)
        zeros = [np.zeros((size, latent), np.float32) for size in self.codes]
        like = self._state(
            self._weights(np.zeros((len(scaling.mean), latent), np.float32)),
            tuple(zeros),
            tuple(zero[:, 0] for zero in zeros),
        )
        leaves = [saved[f"leaf_{i}"] for i in range(len(jax.tree.leaves(like)))]
        return jax.tree.unflatten(jax.tree.structure(like), leaves), scaling

    def _revived(self, state: _State, round_: int) -> _State:
        """The state, with codes that nothing is nearest to put beside those of most vectors."""
        codebooks, counts, sums = [], [], []
        for level, (codebook, count) in enumerate(zip(state.codebooks, state.counts, strict=True)):
            dead = count < RARE
            moved = revive(codebook, np.where(dead, 0, count), (self.seed, round_, level))
            # One vector's worth, so that the first that comes decides where it is.
            count = np.where(dead, 1, count).astype(np.float32)
            codebooks.append(moved)
            counts.append(count)
            sums.append(count[:, None] * moved)
        return state._replace(codebooks=tuple(codebooks), counts=tuple(counts), sums=tuple(sums))


class _Scaling(NamedTuple):
    """Vectors to zero mean and unit variance, the same factor for all of their numbers."""

    mean: np.ndarray
    scale: np.ndarray

    def apply(self, vectors: np.ndarray) -> np.ndarray:
        return (vectors - self.mean) / self.scale

    def undo(self, vectors: np.ndarray) -> np.ndarray:
        return vectors * self.scale + self.mean


class _State(NamedTuple):
    """What a step changes; codebooks are `sums / counts`, moving averages of a batch's."""

    step: np.ndarray
    weights: dict[str, Any]
    adam: optax.ScaleByAdamState
    codebooks: tuple
    counts: tuple
    sums: tuple


def _network(weights: dict[str, Any], vectors: Any) -> jax.Array:
    """A projection, and what layers add to it."""
    added, layers = vectors, (len(weights) - 1) // 2
    for number in range(layers):
        added = added @ weights[f"kernel_{number}"] + weights[f"bias_{number}"]
        if number < layers - 1:
            added = jax.nn.gelu(added)
    return vectors @ weights["project"] + added


def _latents(fitted: Fitted, vectors: np.ndarray) -> np.ndarray:
    scaled = _Scaling(fitted["mean"], fitted["scale"]).apply(vectors)
    return np.asarray(_network(_part(fitted, "encoder"), scaled))


def _part(fitted: Fitted, name: str) -> dict[str, np.ndarray]:
    """The weights of `encoder` or `decoder`."""
    prefix = f"{name}."
    return {key.removeprefix(prefix): x for key, x in fitted.items() if key.startswith(prefix)}


@partial(jax.jit, static_argnames=("config", "mesh"))
def _step(config: RqVae, state: _State, batch_ND: jax.Array, mesh: Mesh) -> _State:
    """One step; every device has its share of the batch."""
    axes, total = mesh.axis_names, batch_ND.size

    def on_one(state: _State, batch_BD: jax.Array) -> tuple[Any, tuple, tuple]:
        def loss(weights: dict[str, Any]) -> tuple[jax.Array, tuple]:
            latent_BZ = _network(weights["encoder"], batch_BD)
            left_BZ, committed, counts, sums = latent_BZ, 0.0, [], []
            for codebook_KZ in state.codebooks:
                near_BK = jnp.sum(codebook_KZ**2, axis=1) - 2 * left_BZ @ codebook_KZ.T
                code_B = jnp.argmin(jax.lax.stop_gradient(near_BK), axis=1)
                size = len(codebook_KZ)
                counts.append(jax.ops.segment_sum(jnp.ones(len(code_B)), code_B, size))
                sums.append(jax.ops.segment_sum(jax.lax.stop_gradient(left_BZ), code_B, size))
                left_BZ = left_BZ - codebook_KZ[code_B]
                committed += jnp.sum(left_BZ**2)
            # The codes' sum, with the latent vector's gradient: straight through.
            quantised_BZ = latent_BZ - jax.lax.stop_gradient(left_BZ)
            back_BD = _network(weights["decoder"], quantised_BZ)
            lost = jnp.sum((batch_BD - back_BD) ** 2) + config.commitment * committed
            return lost / total, (tuple(counts), tuple(sums))

        gradients, (counts, sums) = jax.grad(loss, has_aux=True)(state.weights)
        return jax.lax.psum((gradients, counts, sums), axes)

    gradients, counts, sums = jax.shard_map(
        on_one, mesh=mesh, in_specs=(P(), P(axes)), out_specs=P(), check_vma=False
    )(state, batch_ND)
    updates, adam = optax.scale_by_adam().update(gradients, state.adam)
    rate = optax.warmup_cosine_decay_schedule(
        0.0, config.learning_rate, max(config.steps // 20, 1), config.steps + 1
    )(state.step)
    weights = jax.tree.map(lambda w, update: w - rate * update, state.weights, updates)
    averages = jax.tree.map(
        lambda old, new: config.decay * old + (1 - config.decay) * new,
        (state.counts, state.sums),
        (counts, sums),
    )
    codebooks = tuple(
        sum_KZ / jnp.maximum(count_K, 1e-9)[:, None]
        for count_K, sum_KZ in zip(*averages, strict=True)
    )
    return _State(state.step + 1, weights, adam, codebooks, *averages)
