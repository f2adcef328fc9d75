"""A run's first state: parts of other runs, of Hugging Face folders, and fresh ones."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from prefixmem_jax.config_groups import InitConfig
from prefixmem_jax.data.prepare import TrainingData
from prefixmem_jax.errors import UserError
from prefixmem_jax.hf.load import load_parts, load_rows
from prefixmem_jax.hf.safetensors_files import SafetensorsFolder, has_safetensors
from prefixmem_jax.model_spec import ModelSpec
from prefixmem_jax.models.new_tokens import add_tokens, directions, read_codebooks
from prefixmem_jax.models.token_tables import TOKEN_AXIS
from prefixmem_jax.runs.checkpoint import Checkpoints, abstract_memory_part, has_checkpoint
from prefixmem_jax.runs.run import Run
from prefixmem_jax.storage import to_path
from prefixmem_jax.training.state import TrainState, init_sharded


def initial_state(spec: ModelSpec, options: InitConfig, seed: int) -> TrainState:
    """Every part from exactly one place: `init.run`, `init.from_huggingface`, or fresh."""
    parts = spec.parts
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
        return init_sharded(spec, seed)
    for part in parts:
        named = (part in options.take) + (part in options.fresh)
        if named > 1 or (named == 0 and options.from_huggingface is None):
            raise UserError(
                f"init: part {part!r} must be in exactly one of init.take and init.fresh"
            )
    loaded: dict[str, Any] = {}
    if options.run is not None:
        run = Run(options.run)
        if not run.has_checkpoint:
            raise UserError(
                f"init.run={options.run}: not a run directory with a checkpoint; train that stage "
                "first, or name another run"
            )
        _check_tokens(spec, options, run)
        loaded |= run.load(spec, options.take)
    if options.from_huggingface is not None:
        others = [part for part in parts if part not in (*options.take, *options.fresh)]
        loaded |= parts_of_folder(spec, options, others, seed)
    state = init_sharded(spec, seed, without=loaded)
    memory = loaded.pop("memory", {"rows": state.memory})["rows"]
    params = {part: loaded.get(part, state.params.get(part)) for part in spec.params}
    return _with_params(spec, state._replace(memory=memory), params)


def _check_tokens(spec: ModelSpec, options: InitConfig, run: Run) -> None:
    """Raises UserError where a run's tokens, which its dense parts know, are numbered otherwise."""
    # A table's rows say themselves what they are of, and what projects them knows no token.
    without = {"memory"} if spec.table is None else {"memory", "sid_encoder"}
    if not set(options.take) - without:
        return
    for key, its, own in (
        ("text_tokens", run.config.data.text_tokens, spec.vocabulary.text_tokens),
        (
            "codebook_sizes",
            tuple(run.data_description.codebook_sizes),
            spec.vocabulary.space.codebook_sizes,
        ),
    ):
        if its != own:
            raise UserError(
                f"init.run={options.run}: was trained with data.{key}={its}, here it is {own}; "
                f"expected the same of both (data.{key}=... sets it)"
            )


def first_state(spec: ModelSpec, data: TrainingData) -> TrainState:
    """`initial_state`, with what the objective computes from the data where it takes nothing."""
    config = spec.config
    state = initial_state(spec, config.init, config.seed)
    if config.init.run is not None or config.init.from_huggingface is not None:
        return state
    values = config.objective.first_values(config, data, spec.mesh.local_mesh)
    if not values:
        return state
    return _with_params(spec, state, _replaced(state.params, values))


def _replaced(params: dict[str, Any], values: dict[str, Any]) -> dict[str, Any]:
    """Parameters, those that `values` has in place of their own."""

    def replaced(old: Any, value: Any) -> Any:
        if isinstance(old, dict):
            return _replaced(old, value)
        host = np.asarray(value, old.dtype)
        return jax.make_array_from_callback(old.shape, old.sharding, lambda index: host[index])

    return params | {name: replaced(params[name], value) for name, value in values.items()}


def _with_params(spec: ModelSpec, state: TrainState, params: dict[str, Any]) -> TrainState:
    """The state with other parameters, and where they are averaged the average of those."""
    average = None
    if spec.config.optimizer.average_decay is not None:  # arrays of its own, since steps donate
        average = jax.jit(lambda tree: jax.tree.map(jnp.copy, tree))(params)
    return state._replace(params=params, average=average)


def parts_of_folder(
    spec: ModelSpec, options: InitConfig, parts: list[str], seed: int
) -> dict[str, Any]:
    """Parts of a Hugging Face folder, or of what `prefixmem import` made of one.

    SID tokens that `llm` lacks there are added to it; `memory` comes as {"rows": array}.
    """
    from prefixmem_jax.hf.families import read_folder  # only here: transformers is slow to import

    folder, where = options.from_huggingface, f"init.from_huggingface={options.from_huggingface}"
    if "llm" not in parts:
        raise UserError(f"{where}: part 'llm' comes from there; this run has none, or names it too")
    described = read_folder(folder)
    has = ["llm"] + (["sid_encoder", "memory"] if described.model.sid_encoder is not None else [])
    head = described.model.item_head
    has += ["item_head"] * (head is not None and head.vectors == "own")
    for part in parts:
        if part not in has:
            raise UserError(f"{where}: has no part {part!r}; name it in init.take or init.fresh")
    _check_folder(spec, described, where)
    if "sid_encoder" in parts or "memory" in parts:
        _check_sid_encoder(spec, described, where)
    if "item_head" in parts and described.items != spec.vocabulary.items:
        raise UserError(
            f"{where}: its item head scores {described.items} items, the data has "
            f"{spec.vocabulary.items}; name item_head in init.fresh"
        )

    dense = {part: spec.params[part] for part in parts if part != "memory"}
    dense["llm"] = _with_vocabulary(dense["llm"], described.vocabulary)
    # `prefixmem import` writes no safetensors; checkpoints beside those are another model's.
    if has_checkpoint(to_path(folder)) and not has_safetensors(folder):
        abstract = dict(dense)
        if "memory" in parts:
            abstract["memory"] = abstract_memory_part(spec)
        with Checkpoints(to_path(folder)) as source:
            loaded = source.load(abstract, spec, source.choose())
    else:
        files = SafetensorsFolder(folder)
        loaded = load_parts(files, described.model, dense)
        if "memory" in parts:
            rows = load_rows(files, described.model.sid_encoder, spec.memory)
            loaded["memory"] = {"rows": rows}

    known, vocabulary = described.vocabulary, spec.vocabulary
    if known == vocabulary.size:
        if options.codebooks is not None:
            raise UserError(f"init.codebooks: {folder} has its SID tokens already")
        return loaded
    codebooks = None
    if options.codebooks is not None:
        codebooks = read_codebooks(options.codebooks, vocabulary.space)
    new = directions(known, spec.config.model.d_model, vocabulary, seed, codebooks)
    targets = spec.params["llm"]
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


def _check_folder(spec: ModelSpec, described: Any, where: str) -> None:
    """Raises UserError where a folder is another model, or has another vocabulary."""
    from prefixmem_jax.hf.families import differing_key

    model, vocabulary = spec.config.model, spec.vocabulary
    key = differing_key(described.decoder, model)
    if key is not None:
        raise UserError(
            f"{where}: its {key} is {getattr(described.decoder, key)}, model.{key} is "
            f"{getattr(model, key)}"
        )
    if described.text_tokens != vocabulary.text_tokens:
        raise UserError(
            f"{where}: its vocabulary has {described.text_tokens} text tokens, data.text_tokens is "
            f"{vocabulary.text_tokens}"
        )
    if described.codebook_sizes not in (None, vocabulary.space.codebook_sizes):
        raise UserError(
            f"{where}: its SID tokens have codebooks {described.codebook_sizes}, the data's are "
            f"{vocabulary.space.codebook_sizes}"
        )
    if described.codebook_sizes and described.vocabulary != vocabulary.size:
        raise UserError(
            f"{where}: its vocabulary has {described.vocabulary} tokens, here it has "
            f"{vocabulary.size}; see data.vocabulary_multiple"
        )


def _check_sid_encoder(spec: ModelSpec, described: Any, where: str) -> None:
    ours, theirs = spec.config.sid_encoder, described.model.sid_encoder
    if type(ours) is not type(theirs):
        raise UserError(f"{where}: its SID encoder is {type(theirs).__name__}, not this run's")
    for item in dataclasses.fields(theirs):
        its, own = getattr(theirs, item.name), getattr(ours, item.name)
        if its != own and item.name not in ("dtype", "dropout"):
            raise UserError(f"{where}: its {item.name} is {its}, sid_encoder.{item.name} is {own}")
    multipliers = ours.multipliers(spec.vocabulary.space)
    if not np.array_equal(np.asarray(described.multipliers, np.uint32), multipliers):
        raise UserError(f"{where}: its memory has other hash multipliers; tables mean nothing here")
