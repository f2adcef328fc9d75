"""Stage 2: the baseline's decoder, data and steps, with stage 1's memory attached."""

import dataclasses

import baseline
import classification

from prefixmem_jax.config import Config, InitConfig


def get_config() -> Config:
    parent = baseline.get_config()
    return dataclasses.replace(
        parent,
        name="prefixmem",
        encoder=classification.get_config().encoder,
        optimizer=dataclasses.replace(parent.optimizer, learning_rate=3e-3),
        init=InitConfig(run="runs/classification", take=("memory",), fresh=("llm", "encoder")),
    )
