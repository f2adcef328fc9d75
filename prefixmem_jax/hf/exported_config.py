"""The keys that an exported `config.json` has beside a stock model's, read back and checked."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from pydantic import NonNegativeInt, PositiveInt, TypeAdapter, ValidationError

from prefixmem_jax.config_groups import ItemHeadConfig, Sizes
from prefixmem_jax.errors import UserError
from prefixmem_jax.semantic_ids.space import SidSpace
from prefixmem_jax.semantic_ids.vocabulary import Vocabulary
from prefixmem_jax.sid_encoders.prefix_memory import PrefixMemoryConfig


def object_at(content: dict[str, Any], key: str, where: str) -> dict[str, Any]:
    value = content.get(key)
    if not isinstance(value, dict):
        raise UserError(f"{where}: {key}: expected an object, got {value!r:.80}")
    return value


def validated(kind: type, content: Any, where: str, names: Mapping[str, str]) -> Any:
    """The dataclass that JSON data says, or UserError about the first key that is wrong.

    Args:
      names: what keys are called there, if something else.
    """
    try:
        return TypeAdapter(kind).validate_json(json.dumps(content), strict=True)
    except ValidationError as error:
        first = error.errors()[0]
    key = ".".join(names.get(str(step), str(step)) for step in first["loc"])
    reason = first["msg"].replace("Input should be", "expected")
    raise UserError(f"{where}: {key}: {reason}, got {first['input']!r:.80}")


@dataclass(frozen=True)
class _SemanticIds:
    codebook_sizes: Sizes
    text_tokens: NonNegativeInt


def read_vocabulary(semantic_ids: dict[str, Any], tokens: int, where: str) -> Vocabulary:
    """The vocabulary that `semantic_ids` says a model has.

    Args:
      tokens: of the model.
    """
    where = f"{where}: semantic_ids is malformed"
    keys = {item.name: semantic_ids.get(item.name) for item in dataclasses.fields(_SemanticIds)}
    sids = validated(_SemanticIds, keys, where, {})
    vocabulary = Vocabulary(SidSpace(sids.codebook_sizes), sids.text_tokens)
    if vocabulary.used > tokens:
        raise UserError(
            f"{where}: text_tokens {sids.text_tokens} and codebook_sizes {sids.codebook_sizes} "
            f"make {vocabulary.used} tokens, vocab_size is {tokens}"
        )
    return vocabulary


@dataclass(frozen=True)
class _ItemHead:
    items: PositiveInt
    outputs: PositiveInt


def read_item_head(
    head: dict[str, Any], semantic_ids: dict[str, Any], where: str
) -> tuple[ItemHeadConfig, int, int]:
    """What an item head was trained as by `item_head`; its items, and its outputs."""
    where = f"{where}: item_head is malformed"
    items = semantic_ids.get("items")
    keys = {key: value for key, value in head.items() if key != "outputs"}
    config = validated(ItemHeadConfig, keys, where, {})
    outputs = items if config.vectors == "memory" else head.get("outputs")
    sizes = validated(_ItemHead, {"items": items, "outputs": outputs}, where, {})
    if sizes.outputs < sizes.items:
        raise UserError(f"{where}: outputs: expected {sizes.items} or more, got {sizes.outputs}")
    return config, sizes.items, sizes.outputs


def read_sid_encoder(
    memory: dict[str, Any], space: SidSpace, where: str
) -> tuple[PrefixMemoryConfig, np.ndarray]:
    """What a memory was trained as by `prefix_memory`, and the multipliers of its hash."""
    where = f"{where}: prefix_memory is malformed"
    for item in dataclasses.fields(PrefixMemoryConfig):
        if item.name not in memory and item.name not in ("items", "dropout"):
            raise UserError(f"{where}: {item.name} is missing")
    keys = {key: value for key, value in memory.items() if key != "multipliers"}
    sid_encoder = validated(PrefixMemoryConfig, keys, where, {})
    try:
        sid_encoder.check_keys()
        sid_encoder.check(space)
    except UserError as error:
        raise UserError(f"{where}: {str(error).replace('sid_encoder.', '')}") from None
    shape = (space.levels * (1 + sid_encoder.items), sid_encoder.heads)
    try:
        multipliers = np.array(memory.get("multipliers"), np.uint32)
    except (TypeError, ValueError, OverflowError):
        multipliers = np.zeros(0, np.uint32)
    if multipliers.shape != shape:
        raise UserError(
            f"{where}: multipliers: expected {shape[0]} x {shape[1]} integers below 2^32"
        )
    return sid_encoder, multipliers
