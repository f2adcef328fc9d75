"""Stage 1: the memory tables alone learn to predict each next code from the codes before it."""

import dataclasses

from prefixmem_jax.config import Config
from prefixmem_jax.config_files import inherit
from prefixmem_jax.objectives.classification import Classification
from prefixmem_jax.sid_encoders.prefix_memory import PrefixMemoryConfig


def get_config() -> Config:
    return dataclasses.replace(
        inherit(__file__, "baseline.py"),
        name="classification",
        objective=Classification(),
        sid_encoder=PrefixMemoryConfig(target_levels=(3, 4), orders=3, rows=2**14, d_mem=64),
    )
