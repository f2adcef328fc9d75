"""A run's first state: parts of other runs, of Hugging Face folders, and fresh ones."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from prefixmem_jax.config import Config, InitConfig, PrefixMemoryConfig
from prefixmem_jax.config_files import load_config
from prefixmem_jax.errors import UserError
from prefixmem_jax.sid_encoders.prefix_memory import make_hash
from prefixmem_jax.models.decoder import TOKEN_AXIS
from prefixmem_jax.models.new_tokens import add_tokens, directions, read_codebooks
from prefixmem_jax.runs.checkpoint import Checkpoints, has_checkpoint
from prefixmem_jax.training.step import Trainer, TrainState


def initial_state(trainer: Trainer, options: InitConfig, seed: int) -> TrainState:
    """Every part from exactly one place: `init.run`, `init.from_huggingface`, or fresh."""
    abstract = trainer.abstract_state()
    parts = [*abstract.params, *(["memory"] if abstract.memory is not None else [])]
    for name in (*options.take, *options.fresh):
        if name not in parts:
            raise UserError(f"init: no part {name!r} in this model; it has {', '.join(parts)}")
    if options.run is None and options.take:
        raise UserError(f"init.take names part {options.take[0]!r} but init.run is none")
    if options.codebooks is not None and options.from_huggingface is None:
        raise UserError("init.codebooks is for SID tokens added to init.from_huggingface")
    if options.run is None and options.from_huggingface is None:
        if options.fresh:
            raise UserError(
                f"init.fresh names part {options.fresh[0]!r} but init.run and "
                "init.from_huggingface are none"
            )
        return trainer.init_sharded(seed)
    for part in parts:
        named = (part in options.take) + (part in options.fresh)
        if named > 1 or (named == 0 and options.from_huggingface is None):
            raise UserError(
                f"init: part {part!r} must be in exactly one of init.take and init.fresh"
            )
    loaded: dict[str, Any] = {}
    if options.run is not None:
        loaded |= _parts_of_run(trainer, options)
    if options.from_huggingface is not None:
        others = [part for part in parts if part not in (*options.take, *options.fresh)]
        loaded |= parts_of_folder(trainer, options, others, seed)
    state = trainer.init_sharded(seed, without=loaded)
    memory = loaded.pop("memory", {"rows": state.memory})["rows"]
    params = {part: loaded.get(part, state.params.get(part)) for part in abstract.params}
    return state._replace(params=params, memory=memory)


def _parts_of_run(trainer: Trainer, options: InitConfig) -> dict[str, Any]:
    if not has_checkpoint(Path(options.run)):
        raise UserError(
            f"init.run={options.run}: not a run directory with a checkpoint; train that stage "
            "first, or name another run"
        )
    with Checkpoints(Path(options.run), trainer) as source:
        return source.load(_abstract(trainer, source, options.take))


def _abstract(trainer: Trainer, source: Checkpoints, parts: tuple[str, ...]) -> dict[str, Any]:
    params = trainer.abstract_state().params
    return {part: source.abstract_memory() if part == "memory" else params[part] for part in parts}


def parts_of_folder(
    trainer: Trainer, options: InitConfig, parts: list[str], seed: int
) -> dict[str, Any]:
    """Parts of a Hugging Face folder, or of what `prefixmem import` made of one.

    SID tokens that `llm` lacks there are added to it; `memory` comes as {"rows": array}.
    """
    from prefixmem_jax.hf.families import read_folder  # only here: transformers is slow to import
    from prefixmem_jax.hf.load import load_parts, load_rows
    from prefixmem_jax.hf.safetensors_files import SafetensorsFolder

    folder, where = options.from_huggingface, f"init.from_huggingface={options.from_huggingface}"
    if "llm" not in parts:
        raise UserError(f"{where}: part 'llm' comes from there; this run has none, or names it too")
    described = read_folder(folder)
    has = ["llm"] + (["encoder", "memory"] if described.encoder is not None else [])
    for part in parts:
        if part not in has:
            raise UserError(f"{where}: has no part {part!r}; name it in init.take or init.fresh")
    _check_folder(trainer, described, where)
    if "encoder" in parts or "memory" in parts:
        _check_encoder(trainer, described, where)

    abstract = dict(trainer.abstract_state().params)
    abstract["llm"] = _with_vocabulary(abstract["llm"], described.vocabulary)
    if has_checkpoint(Path(folder)):
        with Checkpoints(Path(folder), trainer) as source:
            loaded = source.load({**_abstract(trainer, source, parts), "llm": abstract["llm"]})
    else:
        files = SafetensorsFolder(folder)
        dense = {part: abstract[part] for part in parts if part != "memory"}
        loaded = load_parts(files, described.decoder, described.encoder, dense)
        if "memory" in parts:
            rows = load_rows(files, described.encoder, trainer.abstract_state().memory)
            loaded["memory"] = {"rows": rows}

    known, space = described.vocabulary, trainer.space
    if known == space.vocabulary_size:
        if options.codebooks is not None:
            raise UserError(f"init.codebooks: {folder} has its SID tokens already")
        return loaded
    codebooks = None if options.codebooks is None else read_codebooks(options.codebooks, space)
    new = directions(known, trainer.config.model.d_model, space, seed, codebooks)
    targets = trainer.abstract_state().params["llm"]
    for name, axis in TOKEN_AXIS.items():
        if name in loaded["llm"]:
            table = loaded["llm"][name]
            loaded["llm"][name] = add_tokens(table, new, axis, targets[name].sharding)
    return loaded


def _with_vocabulary(llm: dict[str, Any], tokens: int) -> dict[str, Any]:
    """Abstract parameters with so many tokens, which lie on every device together."""
    changed = dict(llm)
    for name, axis in TOKEN_AXIS.items():
        if name in llm and llm[name].shape[axis] != tokens:
            shape, partition = list(llm[name].shape), [*llm[name].sharding.spec, None, None][:2]
            shape[axis], partition[axis] = tokens, None
            sharding = NamedSharding(llm[name].sharding.mesh, P(*partition))
            changed[name] = jax.ShapeDtypeStruct(shape, llm[name].dtype, sharding=sharding)
    return changed


def _check_folder(trainer: Trainer, described: Any, where: str) -> None:
    """Raises UserError where a folder is another model, or has another vocabulary."""
    from prefixmem_jax.hf.families import differing_key

    model, space = trainer.config.model, trainer.space
    key = differing_key(described.decoder, model)
    if key is not None:
        raise UserError(
            f"{where}: its {key} is {getattr(described.decoder, key)}, model.{key} is "
            f"{getattr(model, key)}"
        )
    if described.text_tokens != space.text_tokens:
        raise UserError(
            f"{where}: its vocabulary has {described.text_tokens} text tokens, data.text_tokens is "
            f"{space.text_tokens}"
        )
    if described.codebook_sizes not in (None, space.codebook_sizes):
        raise UserError(
            f"{where}: its SID tokens have codebooks {described.codebook_sizes}, the data's are "
            f"{space.codebook_sizes}"
        )
    if described.codebook_sizes and described.vocabulary != space.vocabulary_size:
        raise UserError(
            f"{where}: its vocabulary has {described.vocabulary} tokens, here it has "
            f"{space.vocabulary_size}; see data.vocabulary_multiple"
        )


def _check_encoder(trainer: Trainer, described: Any, where: str) -> None:
    config = trainer.config.encoder
    for item in dataclasses.fields(PrefixMemoryConfig):
        theirs, ours = getattr(described.encoder, item.name), getattr(config, item.name)
        if theirs != ours and item.name != "dtype":
            raise UserError(f"{where}: its {item.name} is {theirs}, encoder.{item.name} is {ours}")
    ours = make_hash(config, trainer.space)["multipliers"]
    if not np.array_equal(np.asarray(described.multipliers, np.uint32), ours):
        raise UserError(f"{where}: its memory has other hash multipliers; tables mean nothing here")


def text_model_of(config: Config) -> str | None:
    """The Hugging Face folder that a run's LLM came from, through the runs it was taken from."""
    for _ in range(100):
        if config.init.from_huggingface is not None:
            return config.init.from_huggingface
        if config.init.run is None or "llm" not in config.init.take:
            return None
        earlier = Path(config.init.run) / "config.json"
        if not earlier.is_file():
            return None
        config = load_config(earlier)
    return None
