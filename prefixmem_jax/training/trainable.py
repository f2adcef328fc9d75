"""Which dense parameters a run trains: `config.OptimizerConfig.scope`.

What is frozen gets no gradient and has no optimizer state. Of the token tables, `new_tokens` trains
the SID tokens only: their optimizer state spans the table, their text rows stay as they are.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from prefixmem_jax.config import Scope
from prefixmem_jax.models.decoder import TOKEN_AXIS


def trained_part(params: dict[str, Any], scope: Scope) -> dict[str, Any]:
    """The subtree of `params` (by part) that the scope trains, at least in part."""
    if scope == "everything" or "llm" not in params:
        return params
    trained = {part: tree for part, tree in params.items() if part != "llm"}
    if scope == "new_tokens":
        llm = params["llm"]
        trained["llm"] = {name: llm[name] for name in TOKEN_AXIS if name in llm}
    return trained


def merged_with(params: dict[str, Any], trained: dict[str, Any]) -> dict[str, Any]:
    """`params` with the leaves of a `trained_part` in their places."""
    if "llm" not in params:
        return trained
    return {**params, **trained, "llm": {**params["llm"], **trained.get("llm", {})}}


def trained_values(
    new: dict[str, Any], old: dict[str, Any], scope: Scope, text_tokens: int
) -> dict[str, Any]:
    """A `trained_part` with `new` values, but for text tokens that the scope freezes."""
    if scope != "new_tokens" or "llm" not in new:
        return new

    def choose(name: str) -> jax.Array:
        axis = TOKEN_AXIS[name]
        trained = jnp.arange(new["llm"][name].shape[axis]) >= text_tokens
        return jnp.where(jnp.expand_dims(trained, 1 - axis), new["llm"][name], old["llm"][name])

    return {**new, "llm": {name: choose(name) for name in new["llm"]}}
