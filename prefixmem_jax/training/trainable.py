"""Which dense parameters learn by their gradient: `config_groups.OptimizerConfig.trainable`, but
for the parts that the objective moves itself.

What is frozen gets no gradient and has no optimizer state. Of the token tables, `new_tokens` trains
the SID tokens only: their optimizer state spans the table, their text rows stay as they are.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from prefixmem_jax.config import Config
from prefixmem_jax.config_groups import Trainable
from prefixmem_jax.models.token_tables import TOKEN_AXIS
from prefixmem_jax.semantic_ids.vocabulary import Vocabulary


def trainable_tree(params: dict[str, Any], config: Config) -> dict[str, Any]:
    """The subtree of `params` (by part) that learns, at least in part of its numbers."""
    trainable, moved = config.optimizer.trainable, config.objective.moved_parts
    params = {part: tree for part, tree in params.items() if part not in moved}
    if trainable == "everything" or "llm" not in params:
        return params
    chosen = {part: tree for part, tree in params.items() if part != "llm"}
    if trainable == "new_tokens":
        llm = params["llm"]
        chosen["llm"] = {name: llm[name] for name in TOKEN_AXIS if name in llm}
    return chosen


def merged_with(params: dict[str, Any], learned: dict[str, Any]) -> dict[str, Any]:
    """`params` with the leaves of a `trainable_tree` in their places."""
    if "llm" not in params:
        return {**params, **learned}
    return {**params, **learned, "llm": {**params["llm"], **learned.get("llm", {})}}


def only_trainable(
    new: dict[str, Any], old: dict[str, Any], trainable: Trainable, vocabulary: Vocabulary
) -> dict[str, Any]:
    """A `trainable_tree` with `new` values, but for text tokens that are frozen."""
    if trainable != "new_tokens" or "llm" not in new:
        return new

    def choose(name: str) -> jax.Array:
        axis = TOKEN_AXIS[name]
        frozen = vocabulary.is_text(jnp.arange(new["llm"][name].shape[axis]))
        return jnp.where(jnp.expand_dims(frozen, 1 - axis), old["llm"][name], new["llm"][name])

    return {**new, "llm": {name: choose(name) for name in new["llm"]}}
