"""Config groups that come in several kinds, one file each: objectives, SID encoders.

There is no registry: a kind is called by its file, and a kind of somebody else's package by
`module:Class`. In JSON, key `kind` says which one it is, and its other keys stand beside it.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import json
import pkgutil
from types import ModuleType
from typing import Any, ClassVar

from pydantic import ConfigDict, GetCoreSchemaHandler, TypeAdapter, ValidationInfo
from pydantic_core import CoreSchema, PydanticCustomError, core_schema

from prefixmem_jax.errors import UserError, nearest

# How configs are checked: no silent conversions but int to float and list to tuple.
STRICT = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False, revalidate_instances="always")


class Kind:
    """Base of the frozen dataclasses that a config chooses among.

    A group's base class names the `package` of its own kinds; each file there defines one subclass.
    A field of a base class's type takes an instance of any of its kinds, or in JSON an object with
    `kind`, or the kind's name alone for one with its defaults.
    """

    package: ClassVar[str]
    __pydantic_config__ = STRICT

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        if "package" not in vars(cls):  # a kind: a dataclass like any other
            return handler(source)
        return core_schema.with_info_plain_validator_function(functools.partial(_validate, cls))


def _validate(base: type[Kind], value: Any, info: ValidationInfo) -> Kind:
    if isinstance(value, base):
        return _adapter(type(value)).validate_python(value)
    keys = {"kind": value} if isinstance(value, str) else value
    name = keys.get("kind") if isinstance(keys, dict) else None
    if not isinstance(name, str):
        raise PydanticCustomError("kind", "expected the name of a kind, or keys with `kind`")
    kind = find_kind(base, name, info.field_name or base.__name__)
    others = {key: item for key, item in keys.items() if key != "kind"}
    return _adapter(kind).validate_json(json.dumps(others))


@functools.cache
def _adapter(kind: type[Kind]) -> TypeAdapter[Kind]:
    return TypeAdapter(kind)


def find_module(package: str, name: str, key: str) -> ModuleType:
    """A file of `package`, or any importable module.

    Args:
      key: of the config, named in errors.

    Raises:
      UserError: neither; names the files of the package.
    """
    own = files_of(package)
    try:
        if all(part.isidentifier() for part in name.split(".")):
            return importlib.import_module(f"{package}.{name}" if name in own else name)
    except ImportError as error:
        absent = isinstance(error, ModuleNotFoundError) and f"{name}.".startswith(f"{error.name}.")
        if not absent:  # the module is there, and fails
            raise UserError(f"{key}: {name}: {error}") from None
    except Exception as error:
        raise UserError(f"{key}: {name}: {type(error).__name__}: {error}") from None
    raise UserError(f"{key}: no kind {name!r}{nearest(name, own)}")


def files_of(package: str) -> list[str]:
    """Files of a package, but for the one that is named like it: `objectives/objective.py`."""
    names = sorted(m.name for m in pkgutil.iter_modules(importlib.import_module(package).__path__))
    return [name for name in names if not package.endswith(f".{name}s")]


def find_kind(base: type[Kind], name: str, key: str) -> type[Kind]:
    """The class of a kind.

    Args:
      base: the group's base class.
      name: of a file in its package, or `module:Class`.
      key: of the config, named in errors.
    """
    module_name, colon, class_name = name.partition(":")
    module = find_module(base.package, module_name, key)
    kinds = [
        value
        for value in vars(module).values()
        if isinstance(value, type)
        and issubclass(value, base)
        and value.__module__ == module.__name__
        and (not colon or value.__name__ == class_name)
        and "package" not in vars(value)
    ]
    if len(kinds) != 1:
        raise UserError(f"{key}: {name!r} names {len(kinds)} kinds of {base.__name__}, expected 1")
    (kind,) = kinds
    if inspect.isabstract(kind):
        missing = ", ".join(sorted(kind.__abstractmethods__))
        raise UserError(f"{key}: {name!r} does not define {missing}")
    return kind


def kind_name(kind: type[Kind]) -> str:
    """What a kind is called: the inverse of `find_kind`."""
    package, _, file = kind.__module__.rpartition(".")
    return file if package == kind.package else f"{kind.__module__}:{kind.__qualname__}"
