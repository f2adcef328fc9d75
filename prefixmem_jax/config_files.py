"""Config files: load one, override it strictly, check it, save it resolved.

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
from pathlib import Path
from typing import Any, Literal, Union

from prefixmem_jax.config import Config
from prefixmem_jax.errors import UserError


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
    if config.optimizer.trainable == "encoder" and config.encoder is None:
        raise UserError("optimizer.trainable=encoder trains the encoder alone, and encoder is none")
    if config.objective == "classification" and config.encoder is None:
        raise UserError("objective=classification trains the encoder, and encoder is none")
