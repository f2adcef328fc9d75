"""Config files: load one, override it strictly, check it, save it resolved.

A config file is Python with `get_config() -> Config`; it starts from another one by `inherit` and
`dataclasses.replace`. A run saves its resolved config as `config.json`, which can be trained again
like any config file. Wherever a config comes from, pydantic validates what its JSON says.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import json
import traceback
import typing
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError
from pydantic_core import from_json

from prefixmem_jax.config import Config
from prefixmem_jax.errors import UserError, nearest
from prefixmem_jax.files import read_json_object
from prefixmem_jax.kinds import Kind, find_kind, kind_name
from prefixmem_jax.storage import to_path
from prefixmem_jax.text import shortened

Root = typing.TypeVar("Root")  # a frozen dataclass of keys: `Config`, or another job's


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Loads a config file (.py with get_config(), or a saved .json) and applies overrides.

    Args:
      path: of a file, or where there is none the name of a config of the package, such as
        `quickstart/baseline`.
      overrides: strings like `optimizer.learning_rate=3e-4`.

    Raises:
      UserError: names the file or key, what is wrong, and the nearest valid name.
    """
    path = _find(to_path(path))
    if path.suffix == ".json":
        try:
            data = from_json(path.read_bytes())
        except ValueError as error:
            raise UserError(f"{path}: not JSON ({error})") from None
    elif path.suffix == ".py":
        data = _plain(_run_config_file(path))
    else:
        raise UserError(f"{path}: a config file ends in .py or .json")
    try:
        config = from_keys(data, Config)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    for text in overrides:
        config = override(config, text)
    try:
        config.check()
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    return config


def packaged_configs() -> Path:
    """The folder of the configs that come with the package."""
    return Path(str(resources.files("prefixmem_jax.configs")))


def _find(path: Path) -> Path:
    """The file that a path or the name of a packaged config means."""
    if path.is_file():
        return path
    folder = packaged_configs()
    packaged = {
        file.relative_to(folder).with_suffix("").as_posix(): file
        for file in sorted(folder.glob("*/*.py"))
        if file.stem != "__init__"
    }
    name = path.as_posix().removeprefix("configs/").removesuffix(".py")
    if name not in packaged:
        hint = "" if path.is_absolute() else nearest(name, list(packaged))
        raise UserError(f"{path}: no such config file{hint}")
    return packaged[name]


def inherit(file: str, name: str) -> Config:
    """The config of another file, relative to this one: `inherit(__file__, "baseline.py")`."""
    return load_config(Path(file).parent / name)


def _run_config_file(path: Path) -> Config:
    names: dict[str, Any] = {"__name__": path.stem, "__file__": str(path)}
    try:
        exec(compile(path.read_bytes(), str(path), "exec", dont_inherit=True), names)
        if "get_config" not in names:
            raise UserError(f"{path}: defines no get_config()")
        config = names["get_config"]()
    except UserError:
        raise
    except (Exception, SystemExit) as error:
        frames = traceback.extract_tb(error.__traceback__)
        lines = [frame.lineno for frame in frames if frame.filename == str(path)]
        if isinstance(error, SyntaxError) and error.filename == str(path):
            lines.append(error.lineno)
        where = f"line {lines[-1]}: " if lines else ""
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise UserError(f"{path}: {where}{reason}") from None
    if not isinstance(config, Config):
        raise UserError(f"{path}: get_config() returned {type(config).__name__}, expected a Config")
    return config


def override(config: Root, text: str) -> Root:
    """Applies one `dotted.key=value`; the value is a Python literal, or text for strings."""
    key, equals, written = text.partition("=")
    if not (key and equals):
        raise UserError(f"{text!r}: an override is key=value, such as optimizer.learning_rate=3e-4")
    data = _plain(config)
    *groups, name = key.split(".")
    node = data
    for depth, group in enumerate(groups, 1):
        node = node.setdefault(group, {})
        if not isinstance(node, dict):
            what = "none in this config" if node is None else "a value, not a group of keys"
            raise UserError(f"{key}: {'.'.join(groups[:depth])} is {what}")
    node[name] = value = _literal(written)
    try:
        return _adapter(type(config)).validate_json(json.dumps(data))
    except ValidationError as error:
        first = error.errors()[0]
        if first["loc"] == (*groups, name):
            if first["type"] in ("string_type", "literal_error"):
                node[name] = written  # a path may look like a number, and `none` be a choice
            elif first["type"] == "tuple_type":
                node[name] = [value]
            elif first["type"] == "int_type" and isinstance(value, float) and value.is_integer():
                node[name] = int(value)  # steps=1e3
    return from_keys(data, type(config))


def _literal(text: str) -> Any:
    words = {"none": None, "null": None, "true": True, "false": False}
    if text.lower() in words:
        return words[text.lower()]
    try:
        value = json.loads(json.dumps(ast.literal_eval(text)))
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return text
    return text if isinstance(value, dict) else value


def to_json(config: Any) -> str:
    """The resolved config, every key present; `kind` first where a group comes in kinds."""
    return json.dumps(config, indent=2, default=_keys) + "\n"


def read_config(path: Path, root: type[Root]) -> Root:
    """What `to_json` wrote of a job's keys; UserError names the file where it is something else."""
    data = read_json_object(path)
    try:
        return from_keys(data, root)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def _plain(config: Any) -> dict[str, Any]:
    return json.loads(to_json(config))


def _keys(value: Any) -> dict[str, Any]:
    """The keys of a group; of anything else that JSON cannot say, an object that no key accepts."""
    if isinstance(value, type) or not dataclasses.is_dataclass(value):
        return {type(value).__name__: str(value)}
    kind = {"kind": kind_name(type(value))} if isinstance(value, Kind) else {}
    return kind | {item.name: getattr(value, item.name) for item in dataclasses.fields(value)}


@functools.cache
def _adapter(root: type[Root]) -> TypeAdapter[Root]:
    return TypeAdapter(root)


def from_keys(data: Any, root: type[Root]) -> Root:
    """The config that keys, as JSON has them, say; UserError names the first one that is wrong."""
    try:
        return _adapter(root).validate_json(json.dumps(data))
    except ValidationError as error:
        first = error.errors()[0]
    path = [step for step in first["loc"] if isinstance(step, str)]
    key, what, value = ".".join(path), first["type"], shortened(repr(first["input"]))
    if what == "json_invalid":  # all that json.dumps writes and JSON does not allow
        raise UserError("a value is not UTF-8 text")
    if what == "unexpected_keyword_argument":
        group = "".join(f"{step}." for step in path[:-1])
        hint = nearest(path[-1], _names(root, data, path[:-1]), group)
        raise UserError(f"{key}: no such key{hint}")
    if what == "missing":
        raise UserError(f"{key} is missing")
    if what == "dataclass_type" and not path:
        raise UserError(f"expected an object of keys, got {value}")
    if what == "dataclass_type":
        example = f"{key}.{_names(root, data, path)[0]}"
        raise UserError(f"{key} is a group of keys; set one of them, such as {example}")
    if what == "literal_error":
        valid = first["ctx"]["expected"].replace(" or ", ", ").replace("'", "")
        raise UserError(f"{key}: {value} is not one of {valid}")
    reason = first["msg"].removeprefix("Value error, ").replace("Input should be", "expected")
    if what in _TYPES:
        reason = f"expected {_TYPES[what]}"
    raise UserError(f"{key}: {reason}, got {value}")


# What was expected, by pydantic's type of error.
_TYPES = {
    "int_type": "int",
    "float_type": "float",
    "bool_type": "bool",
    "string_type": "str",
    "tuple_type": "a list",
}


def _names(root: type, data: Any, path: Sequence[str]) -> list[str]:
    """Keys of the group that stands at a path."""
    group: Any = root
    for step in path:
        hint = typing.get_type_hints(group)[step]
        group = next(t for t in (hint, *typing.get_args(hint)) if dataclasses.is_dataclass(t))
        data = data[step]
        if issubclass(group, Kind):
            group = find_kind(group, data["kind"], step)
    return [item.name for item in dataclasses.fields(group)]
