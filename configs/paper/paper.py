"""The paper's comparison at its own size: Qwen3-1.7B's shape on flat SID tokens, 5 x 2048 codes.

For pods: `prefixmem paper TABLE --scale paper --configs` writes the config of every row, each to be
planned and trained by itself. Data for it: 33.5M items and 10M users.
"""

import dataclasses

from prefixmem_jax.config import Config
from prefixmem_jax.config_files import inherit
from prefixmem_jax.config_groups import EvaluationConfig


def get_config() -> Config:
    config = inherit(__file__, "../models/qwen3_1p7b.py")
    return dataclasses.replace(
        config,
        name="baseline",
        data=dataclasses.replace(config.data, split="users", holdout=0.01),
        evaluation=EvaluationConfig(
            every_steps=5000, validation_examples=2000, users=10_000, beam=100, exclude_seen=False
        ),
    )
