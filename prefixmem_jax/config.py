"""Experiments as frozen dataclasses: load a config file, override it strictly, save it resolved.

A config file is Python with `get_config() -> Config`; it inherits by calling another file's
`get_config()` and `dataclasses.replace`. A run saves its resolved config as `config.json`, which
can be trained again like any config file.
"""

from __future__ import annotations

import ast
import dataclasses
import difflib
import importlib.util
import json
import sys
import traceback
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Union

from prefixmem_jax.errors import UserError

DType = Literal["float32", "bfloat16"]
AddressScheme = Literal["prefix", "suffix", "full_prefix"]
Scope = Literal["everything", "new_tokens", "encoder"]


@dataclass(frozen=True)
class SyntheticConfig:
    """Size and shape of the synthetic dataset; `data.synthetic` says what each means."""

    items: int = 20_000
    users: int = 20_000
    codebook_sizes: tuple[int, ...] = (32, 64, 64, 64)
    children: tuple[int, ...] = (32, 10, 10, 10)
    zipf_exponent: float = 0.8
    groups: int = 12
    liked_codes: int = 3
    liking: float = 30.0
    loyalty: float = 0.5
    mean_length: float = 10.0
    max_length: int = 40
    seed: int = 0


@dataclass(frozen=True)
class DataConfig:
    """Where histories come from and how they become batches.

    Attributes:
      path: dataset folder (docs/data.md); none means the synthetic dataset.
      sid_column: column of items.parquet with the SIDs.
      codebook_sizes: codes per level; none means largest code + 1 of each level.
      split: see `data.splits.split_dataset`.
      holdout: share held out for validation, and again for test (splits time and users).
      text_tokens: size of the text vocabulary that stands before the SID tokens.
      vocabulary_multiple: the vocabulary is filled up to a multiple of this with tokens that never
        occur, so that tensor-parallel devices can divide it.
      max_items: items of history that a sequence may hold.
      sequence_length: tokens in one packed row.
      batch_size: rows in one global batch.
    """

    path: str | None = None
    sid_column: str = "sid"
    codebook_sizes: tuple[int, ...] | None = None
    split: Literal["leave_two_out", "time", "users"] = "leave_two_out"
    holdout: float = 0.1
    text_tokens: int = 0
    vocabulary_multiple: int = 1
    max_items: int = 20
    sequence_length: int = 128
    batch_size: int = 40
    synthetic: SyntheticConfig = field(default_factory=SyntheticConfig)


@dataclass(frozen=True)
class RopeScalingConfig:
    """How rotary frequencies are stretched for long contexts.

    Attributes:
      kind: `linear` divides all by `factor`; `llama3` divides those with wavelengths over
        original_length / low_frequency_factor, keeps those under
        original_length / high_frequency_factor, and blends between.
    """

    kind: Literal["linear", "llama3"]
    factor: float
    low_frequency_factor: float = 1.0
    high_frequency_factor: float = 4.0
    original_length: int = 8192


@dataclass(frozen=True)
class DecoderConfig:
    """Shape of the decoder. Qwen3, Llama 3 and Gemma 3 differ by these values alone.

    Attributes:
      qk_norm: normalise queries and keys per head.
      norm_plus_one: norms multiply by 1 + scale.
      post_norms: normalise the outputs of attention and feed-forward too.
      query_scale: of queries before the softmax; none means head_dim ** -0.5.
      scale_embedding: multiply token embeddings by the root of d_model.
      logit_softcap: bound c on logits, c * tanh(logits / c).
      sliding_layers: 0-based layers that attend to the last `sliding_window` positions only, with
        rotary base `sliding_rope_base` and without `rope_scaling`.
      compute_dtype: of activations and matrix products; parameters, norms, softmax and logits
        are float32.
      remat: recompute each layer in the backward pass instead of keeping its activations.
    """

    layers: int = 2
    d_model: int = 96
    d_ff: int = 256
    query_heads: int = 4
    kv_heads: int = 2
    head_dim: int = 24
    activation: Literal["silu", "gelu_tanh"] = "silu"
    qk_norm: bool = True
    norm_plus_one: bool = False
    post_norms: bool = False
    query_scale: float | None = None
    scale_embedding: bool = False
    logit_softcap: float | None = None
    tied_embeddings: bool = False
    rope_base: float = 10_000.0
    rope_scaling: RopeScalingConfig | None = None
    sliding_layers: tuple[int, ...] = ()
    sliding_window: int = 0
    sliding_rope_base: float = 10_000.0
    norm_epsilon: float = 1e-6
    init_std: float = 0.02
    compute_dtype: DType = "float32"
    remat: bool = False


@dataclass(frozen=True)
class PrefixMemoryConfig:
    """PrefixMem's sizes; defaults are the paper's.

    Attributes:
      target_levels: 1-based levels to help predict: (4, 5) adds the vector at the positions of
        c_3 and c_4.
      orders: N_max, the longest n-gram.
      heads: H, hash heads per n-gram.
      rows: T, rows in each of the orders * heads tables.
      d_mem: width of the memory vector; each row has d_mem / heads numbers.
      dtype: how rows are stored; bfloat16 rows are updated in float32 and rounded stochastically.
      address: which n-grams of the prefix are hashed, see `memory.hashing`.
      seed: fixes the hash multipliers. Tables mean nothing under other multipliers.
    """

    target_levels: tuple[int, ...] = (4, 5)
    orders: int = 4
    heads: int = 4
    rows: int = 2_000_000
    d_mem: int = 256
    dtype: DType = "float32"
    address: AddressScheme = "prefix"
    seed: int = 0


@dataclass(frozen=True)
class MemoryOptimizerConfig:
    """How the memory's rows are updated: only those in the batch (docs/memory.md).

    Attributes:
      kind: `adam`, `row_adam` (one second moment a row), `adagrad` (row-wise: one number of state
        a row) or `sgd`. Adam's betas and epsilon are the dense optimizer's.
      rate: peak learning rate as a multiple of the dense one, 5 in the paper.
      warmup_steps, final_rate: of its own schedule; none means the dense one's.
      weight_decay: decoupled, on the rows in the batch; steps that miss a row do not decay it.
    """

    kind: Literal["adam", "row_adam", "adagrad", "sgd"] = "adam"
    rate: float = 5.0
    warmup_steps: int | None = None
    final_rate: float | None = None
    weight_decay: float = 0.0


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW with linear warm-up and cosine decay.

    Attributes:
      scope: which parameters are trained. `new_tokens` freezes the LLM but for the embeddings (and
        head) of its SID tokens; `encoder` freezes the whole LLM. The encoder is always trained.
      clip_norm: bound on the global gradient norm; the memory's row gradients count in it.
      weight_decay: on matrices of the dense model; norms and memory rows are not decayed.
      final_rate: the learning rate at the end as a share of its peak.
      accumulation_steps: parts that a batch is cut into; their gradients are computed one after
        the other and applied once, which needs less memory and gives the same step.
    """

    learning_rate: float = 3e-3
    warmup_steps: int = 50
    final_rate: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.99
    epsilon: float = 1e-8
    weight_decay: float = 0.1
    clip_norm: float = 1.0
    accumulation_steps: int = 1
    scope: Scope = "everything"
    memory: MemoryOptimizerConfig = field(default_factory=MemoryOptimizerConfig)


@dataclass(frozen=True)
class InitConfig:
    """Where parameters come from when the run has no checkpoint of its own.

    Attributes:
      from_huggingface: model folder, or what `prefixmem import` made of one. Parts come from there
        that neither `take` nor `fresh` names: `llm`, and if `prefixmem export` wrote it with one,
        `encoder` and `memory`. `hf.families.read_folder` gives the `model` and `data.text_tokens`
        that it needs. SID tokens that it lacks start around the mean of its vocabulary.
      codebooks: .npz of code centroids by level that those SID tokens start from; none means noise.
      run: run directory whose newest checkpoint to read; none means start from scratch.
      take: parts to read from it.
      fresh: parts to initialise anew. With `run` or `from_huggingface`, every part of the model
        must come from exactly one place.
    """

    from_huggingface: str | None = None
    codebooks: str | None = None
    run: str | None = None
    take: tuple[str, ...] = ()
    fresh: tuple[str, ...] = ()


@dataclass(frozen=True)
class MeshConfig:
    """Sizes of the device mesh; one may be -1, which takes the devices that are left.

    Attributes:
      data: replicas of the dense model (the memory table is never replicated).
      fsdp: devices that share the dense parameters and their optimizer state, each with its own
        part of the batch.
      tensor: devices that divide heads, feed-forward and vocabulary of one part of the batch.
    """

    data: int = -1
    fsdp: int = 1
    tensor: int = 1


@dataclass(frozen=True)
class CheckpointConfig:
    """When to save, and how many checkpoints to keep (the newest)."""

    every_steps: int = 200
    keep: int = 2


@dataclass(frozen=True)
class EvaluationConfig:
    """How runs are judged.

    Attributes:
      every_steps: steps between validations during training.
      validation_examples: examples in each of those (a fixed sample).
      users: test users for retrieval metrics (a fixed sample; 0 means all).
      beam: width of the beam search.
      batch_size: users per beam-search batch.
    """

    every_steps: int = 100
    validation_examples: int = 1000
    users: int = 0
    beam: int = 20
    batch_size: int = 64


@dataclass(frozen=True)
class Config:
    """One training run of one objective (a stage).

    Attributes:
      objective: `classification` trains the encoder alone to predict each next code (stage 1);
        `next_token` trains the decoder, with the encoder if there is one (stage 2, baseline).
      encoder: the SID encoder, or none.
    """

    name: str
    objective: Literal["classification", "next_token"] = "next_token"
    steps: int = 1000
    seed: int = 0
    log_every_steps: int = 10
    data: DataConfig = field(default_factory=DataConfig)
    model: DecoderConfig = field(default_factory=DecoderConfig)
    encoder: PrefixMemoryConfig | None = None
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    init: InitConfig = field(default_factory=InitConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)


def load_config(path: str | Path, overrides: typing.Sequence[str] = ()) -> Config:
    """Loads a config file (.py with get_config(), or a saved .json) and applies overrides.

    Args:
      overrides: strings like `optimizer.learning_rate=3e-4`.

    Raises:
      UserError: names the file or key, what is wrong, and the nearest valid name.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such config file")
    if path.suffix == ".json":
        try:
            config = _from_json(Config, json.loads(path.read_text()), str(path), "")
        except json.JSONDecodeError as error:
            raise UserError(f"{path}: not JSON ({error})") from None
    elif path.suffix == ".py":
        config = _run_config_file(path)
    else:
        raise UserError(f"{path}: a config file ends in .py or .json")
    for text in overrides:
        config = override(config, text)
    _check_values(config)
    return config


def _run_config_file(path: Path) -> Config:
    folder = str(path.resolve().parent)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    known = set(sys.modules)
    sys.path.insert(0, folder)  # a config imports its parent by name
    try:
        spec.loader.exec_module(module)
        if not hasattr(module, "get_config"):
            raise UserError(f"{path}: defines no get_config()")
        config = module.get_config()
    except UserError:
        raise
    except Exception as error:
        frames = traceback.extract_tb(error.__traceback__)
        inside = [frame for frame in frames if frame.filename.startswith(folder)]
        line = getattr(error, "lineno", None) or (inside[-1].lineno if inside else "?")
        raise UserError(f"{path}: line {line}: {type(error).__name__}: {error}") from None
    finally:
        sys.path.remove(folder)
        for name in set(sys.modules) - known:  # another folder may have a config of that name
            if str(getattr(sys.modules[name], "__file__", "")).startswith(folder):
                del sys.modules[name]
    if not isinstance(config, Config):
        raise UserError(
            f"{path}: get_config() returned {type(config).__name__}, expected prefixmem_jax.Config"
        )
    return config


def override(config: Config, text: str) -> Config:
    """Applies one `dotted.key=value`; the value is a Python literal, or text for strings."""
    key, equals, value = text.partition("=")
    if not equals:
        raise UserError(f"{text!r}: an override is key=value, such as optimizer.learning_rate=3e-4")
    return _override(config, key.split("."), value, key)


def _override(node: Any, path: list[str], text: str, key: str) -> Any:
    hints = typing.get_type_hints(type(node))
    name = path[0]
    if name not in hints:
        raise UserError(f"{key}: no such key{_nearest(name, hints, key[: -len('.'.join(path))])}")
    if len(path) == 1:
        return dataclasses.replace(node, **{name: _parse(text, hints[name], key)})
    child = getattr(node, name)
    if not dataclasses.is_dataclass(child):
        where = key[: len(key) - len(".".join(path[1:])) - 1]
        what = "none in this config" if child is None else "a value, not a group of keys"
        raise UserError(f"{key}: {where} is {what}")
    return dataclasses.replace(node, **{name: _override(child, path[1:], text, key)})


def _nearest(name: str, valid: typing.Iterable[str], prefix: str = "") -> str:
    valid = list(valid)
    close = difflib.get_close_matches(name, valid, n=1, cutoff=0.5)
    if close:
        return f"; did you mean {prefix}{close[0]}?"
    return f"; valid here: {', '.join(valid)}"


def _parse(text: str, hint: Any, key: str) -> Any:
    if text.lower() in ("none", "null"):
        value = None
    elif text.lower() in ("true", "false"):
        value = text.lower() == "true"
    else:
        try:
            value = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            value = text
    optional_text = _is_union(hint) and str in typing.get_args(hint)
    if hint is str or (optional_text and value is not None):
        value = text  # a path may look like a number
    return _coerce(value, hint, key)


def _is_union(hint: Any) -> bool:
    return typing.get_origin(hint) in (Union, types.UnionType)


def _coerce(value: Any, hint: Any, key: str) -> Any:
    """The value as the annotated type, or UserError; ints become floats, lists tuples."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if _is_union(hint):
        if value is None and type(None) in arguments:
            return None
        return _coerce(value, next(a for a in arguments if a is not type(None)), key)
    if origin is Literal:
        if value not in arguments:
            raise UserError(f"{key}: {value!r} is not one of {', '.join(map(str, arguments))}")
        return value
    if origin is tuple:
        items = value if isinstance(value, (list, tuple)) else [value]
        return tuple(_coerce(item, arguments[0], key) for item in items)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if hint is int and isinstance(value, bool):
        raise UserError(f"{key}: expected int, got {value}")
    if dataclasses.is_dataclass(hint):
        if isinstance(value, hint):
            return value
        example = f"{key}.{dataclasses.fields(hint)[0].name}"
        raise UserError(f"{key} is a group of keys; set one of them, such as {example}")
    if not isinstance(value, hint):
        raise UserError(f"{key}: expected {hint.__name__}, got {value!r}")
    return value


def to_json(config: Config) -> str:
    """The resolved config, every key present."""
    return json.dumps(dataclasses.asdict(config), indent=2) + "\n"


def _from_json(kind: Any, value: Any, file: str, key: str) -> Any:
    if not isinstance(value, dict):
        raise UserError(f"{file}: {key or 'the file'} must hold an object of keys")
    hints = typing.get_type_hints(kind)
    unknown = next((name for name in value if name not in hints), None)
    if unknown is not None:
        raise UserError(f"{file}: {key}{unknown}: no such key{_nearest(unknown, hints, key)}")
    fields = {}
    for name, item in value.items():
        hint = hints[name]
        nested = next(
            (h for h in (hint, *typing.get_args(hint)) if dataclasses.is_dataclass(h)), None
        )
        if nested is not None and item is not None:
            fields[name] = _from_json(nested, item, file, f"{key}{name}.")
        else:
            fields[name] = _coerce(item, hint, f"{file}: {key}{name}")
    try:
        return kind(**fields)
    except TypeError as error:
        raise UserError(f"{file}: {key or 'top level'}: {error}") from None


# Keys, by group, whose value must be more than 0.
_POSITIVE = {
    "data": ("vocabulary_multiple", "max_items", "sequence_length", "batch_size"),
    "model": ("layers", "d_model", "d_ff", "query_heads", "kv_heads", "head_dim"),
    "encoder": ("orders", "heads", "rows", "d_mem"),
    "optimizer": ("learning_rate", "clip_norm", "accumulation_steps"),
    "optimizer.memory": ("rate",),
    "checkpoint": ("every_steps", "keep"),
    "evaluation": ("every_steps", "validation_examples", "beam", "batch_size"),
    "": ("steps", "log_every_steps"),
}


def _check_values(config: Config) -> None:
    """Types (a config file is Python and may hold anything) and ranges of every value."""

    def walk(node: Any, prefix: str) -> None:
        hints = typing.get_type_hints(type(node))
        for item in dataclasses.fields(node):
            value, key = getattr(node, item.name), prefix + item.name
            _coerce(value, hints[item.name], key)
            if dataclasses.is_dataclass(value):
                walk(value, key + ".")
            elif item.name in _POSITIVE.get(prefix[:-1], ()) and not value > 0:
                raise UserError(f"{key}: expected more than 0, got {value}")

    walk(config, "")
    if not 0 < config.data.holdout < 0.5:
        raise UserError(f"data.holdout: expected between 0 and 0.5, got {config.data.holdout}")
    model = config.model
    if model.query_heads % model.kv_heads:
        raise UserError(
            f"model.query_heads={model.query_heads} is not a multiple of "
            f"model.kv_heads={model.kv_heads}"
        )
    if model.sliding_layers and model.sliding_window < 1:
        raise UserError(
            f"model.sliding_window={model.sliding_window}: layers {model.sliding_layers} slide; "
            "expected 1 or more"
        )
    if any(not 0 <= layer < model.layers for layer in model.sliding_layers):
        raise UserError(
            f"model.sliding_layers={model.sliding_layers}: layers are 0..{model.layers - 1}"
        )
    if model.head_dim % 2:
        raise UserError(f"model.head_dim={model.head_dim} is odd; rotary embeddings need pairs")
    if config.encoder is not None and config.encoder.d_mem % config.encoder.heads:
        raise UserError(
            f"encoder.d_mem={config.encoder.d_mem} does not divide by "
            f"encoder.heads={config.encoder.heads}"
        )
    if config.optimizer.scope == "encoder" and config.encoder is None:
        raise UserError("optimizer.scope=encoder trains the encoder alone, and encoder is none")
    if config.objective == "classification" and config.encoder is None:
        raise UserError("objective=classification trains the encoder, and encoder is none")
