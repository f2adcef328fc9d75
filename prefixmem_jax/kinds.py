"""Config groups that come in several kinds, one file each: objectives, SID encoders.

There is no registry: a kind is called by its file, and a kind of somebody else's package by
`module:Class`.
"""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import pkgutil
from types import ModuleType
from typing import ClassVar

from prefixmem_jax.errors import UserError


class Kind:
    """Base of the frozen dataclasses that a config chooses among.

    A group's base class names the `package` of its own kinds; each file there defines one subclass.
    """

    package: ClassVar[str]


def find_module(package: str, name: str, key: str) -> ModuleType:
    """A file of `package`, or any importable module.

    Raises:
      UserError: neither; names the files of the package.
    """
    own = f"{package}.{name}"
    try:
        if "." not in name and importlib.util.find_spec(own) is not None:
            return importlib.import_module(own)
        return importlib.import_module(name)
    except ImportError as error:
        if error.name and not name.startswith(error.name):  # the module is there, and fails
            raise UserError(f"{key}: {name}: {error}") from None
        siblings = siblings_of(package)
        close = difflib.get_close_matches(name, siblings, n=1, cutoff=0.5)
        hint = f"did you mean {close[0]}?" if close else f"valid here: {', '.join(siblings)}"
        raise UserError(f"{key}: no kind {name!r}; {hint}") from None


def siblings_of(package: str) -> list[str]:
    """Files of a package."""
    return sorted(m.name for m in pkgutil.iter_modules(importlib.import_module(package).__path__))


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
    return kinds[0]


def kind_name(kind: type[Kind]) -> str:
    """What a kind is called: the inverse of `find_kind`."""
    package, _, file = kind.__module__.rpartition(".")
    return file if package == kind.package else f"{kind.__module__}:{kind.__qualname__}"
