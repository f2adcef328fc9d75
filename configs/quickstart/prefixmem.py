"""Stage 2: the baseline's decoder, data and steps, with stage 1's memory attached."""

import dataclasses

from prefixmem_jax.config import Config
from prefixmem_jax.config_files import inherit
from prefixmem_jax.config_groups import InitConfig


def get_config() -> Config:
    parent = inherit(__file__, "baseline.py")
    return dataclasses.replace(
        parent,
        name="prefixmem",
        sid_encoder=inherit(__file__, "classification.py").sid_encoder,
        optimizer=dataclasses.replace(parent.optimizer, learning_rate=3e-3),
        init=InitConfig(run="runs/classification", take=("memory",), fresh=("llm", "sid_encoder")),
    )
