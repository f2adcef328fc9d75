"""Stage 1: the memory tables alone learn to predict each next code from the codes before it."""

import dataclasses

import baseline

from prefixmem_jax.config import Config, PrefixMemoryConfig


def get_config() -> Config:
    parent = baseline.get_config()
    return dataclasses.replace(
        parent,
        name="classification",
        objective="classification",
        encoder=PrefixMemoryConfig(target_levels=(3, 4), orders=3, rows=2**14, d_mem=64),
    )
