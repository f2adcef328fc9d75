"""Reading safetensors straight into sharded arrays: one tensor on the host at a time."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open

from prefixmem_jax.config import DecoderConfig
from prefixmem_jax.errors import UserError
from prefixmem_jax.hf.mapping import Weight, weights

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
NOISE = 0.1


class SafetensorsFolder:
    """The tensors of a folder, in one file or in several with an index."""

    def __init__(self, folder: str | Path):
        folder = Path(folder)
        if (folder / INDEX).is_file():
            try:
                files = json.loads((folder / INDEX).read_text())["weight_map"]
            except (json.JSONDecodeError, KeyError, TypeError) as error:
                raise UserError(
                    f"{folder / INDEX}: expected JSON with a weight_map ({error})"
                ) from None
        elif (folder / SINGLE).is_file():
            files = dict.fromkeys(self._names(folder / SINGLE), SINGLE)
        else:
            raise UserError(f"{folder}: no {SINGLE} and no {INDEX}")
        self.folder = folder
        self.files: dict[str, str] = files
        for name in sorted(set(files.values())):
            if not (folder / name).is_file():
                raise UserError(f"{folder}: {name} is missing, which {INDEX} names")
            self._names(folder / name)  # that it can be read

    @staticmethod
    def _names(path: Path) -> list[str]:
        try:
            with safe_open(path, framework="np") as file:
                return list(file.keys())
        except SafetensorError as error:
            raise UserError(f"{path}: not a safetensors file ({error})") from None

    def shape(self, name: str) -> tuple[int, ...]:
        with safe_open(self.folder / self.files[name], framework="np") as file:
            return tuple(file.get_slice(name).get_shape())

    def read(self, name: str) -> np.ndarray:
        with safe_open(self.folder / self.files[name], framework="np") as file:
            return file.get_tensor(name)


def load_decoder(
    folder: str | Path, config: DecoderConfig, abstract: dict[str, Any], seed: int = 0
) -> dict[str, Any]:
    """A decoder's parameters from a Hugging Face folder.

    Where ours has more tokens than the folder, the new ones (embedding, and head if it is not
    tied) are drawn around the mean of the vocabulary: near what the model knows, and apart.

    Args:
      abstract: nested dict of `jax.ShapeDtypeStruct` with shardings, as
        `Trainer.abstract_state().params["llm"]`.

    Raises:
      UserError: a tensor is missing, left over, or of another shape; lists them.
    """
    source = SafetensorsFolder(folder)
    table = weights(config)
    _check(source, config, table, abstract)
    found: dict[str, Any] = {}
    for weight in table:
        target = _at(abstract, weight.path)
        branch = found
        for key in weight.path[:-1]:
            branch = branch.setdefault(key, {})
        branch[weight.path[-1]] = _load(source, weight, target, seed)
    return found


def with_new_tokens(table_VD: np.ndarray, tokens: int, seed: int) -> np.ndarray:
    """A vocabulary's vectors [V, D] and those of new tokens after them, [tokens, D].

    A new one is the mean plus NOISE times the spread of each dimension, fixed by the seed.
    """
    if tokens == len(table_VD):
        return table_VD
    known = table_VD.astype(np.float32)
    noise = np.random.default_rng(seed).normal(size=(tokens - len(known), known.shape[1]))
    new = known.mean(axis=0) + NOISE * known.std(axis=0) * noise
    return np.concatenate([known, new.astype(np.float32)])


def _at(tree: dict[str, Any], path: tuple[str, ...]) -> Any:
    for key in path:
        tree = tree[key]
    return tree


def _names(config: DecoderConfig, weight: Weight) -> list[str]:
    if not weight.per_layer:
        return [weight.name]
    return [weight.name.format(layer=layer) for layer in range(config.layers)]


def _check(
    source: SafetensorsFolder,
    config: DecoderConfig,
    table: list[Weight],
    abstract: dict[str, Any],
) -> None:
    expected = {}
    for weight in table:
        shape = _at(abstract, weight.path).shape
        for name in _names(config, weight):
            expected[name] = weight.hf_shape(shape[1:] if weight.per_layer else shape)
    # Where embeddings are tied, some files repeat them as a head.
    names = set(source.files) - ({"lm_head.weight"} if config.tied_embeddings else set())
    problems = [f"missing {name}" for name in sorted(expected.keys() - names)]
    problems += [f"unexpected {name}" for name in sorted(names - expected.keys())]
    by_token = {weight.name for weight in table if weight.by_token}
    for name in sorted(expected.keys() & names):
        shape, wanted = source.shape(name), expected[name]
        more_tokens = name in by_token and shape[0] <= wanted[0] and shape[1:] == wanted[1:]
        if shape != wanted and not more_tokens:
            problems.append(f"{name}: shape {shape}, expected {wanted}")
    if problems:
        raise UserError(f"{source.folder}: {len(problems)} tensors do not fit: {_some(problems)}")


def _some(problems: list[str], most: int = 20) -> str:
    shown = "; ".join(problems[:most])
    return shown if len(problems) <= most else f"{shown}; and {len(problems) - most} more"


def _load(
    source: SafetensorsFolder, weight: Weight, target: jax.ShapeDtypeStruct, seed: int
) -> jax.Array:
    if not weight.per_layer:
        array = source.read(weight.name)
        if weight.by_token:
            array = with_new_tokens(array, weight.hf_shape(target.shape)[0], seed)
        array = weight.to_ours(array, target.shape)
        return _placed(array, target.dtype, target.sharding)
    layer_sharding = jax.sharding.NamedSharding(
        target.sharding.mesh, jax.sharding.PartitionSpec(*target.sharding.spec[1:])
    )

    def layers() -> Iterator[jax.Array]:
        for layer in range(target.shape[0]):
            array = source.read(weight.name.format(layer=layer))
            array = weight.to_ours(array, target.shape[1:])
            yield _placed(array, target.dtype, layer_sharding)

    with jax.set_mesh(target.sharding.mesh):
        stacked = jax.jit(
            lambda: jnp.zeros(target.shape, target.dtype), out_shardings=target.sharding
        )()
        put = jax.jit(
            lambda stacked, one, layer: stacked.at[layer].set(one),
            donate_argnums=0,
            out_shardings=target.sharding,
        )
        for layer, one in enumerate(layers()):
            stacked = put(stacked, one, layer)
    return stacked


def _placed(array: np.ndarray, dtype: Any, sharding: jax.sharding.Sharding) -> jax.Array:
    return jax.make_array_from_callback(
        array.shape, sharding, lambda index: np.asarray(array[index]).astype(dtype)
    )
