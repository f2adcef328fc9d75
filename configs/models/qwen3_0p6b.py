"""Qwen3-0.6B: its shape, in the setting of qwen3_1p7b.py."""

import dataclasses

from prefixmem_jax.config import Config
from prefixmem_jax.config_files import inherit


def get_config() -> Config:
    config = inherit(__file__, "qwen3_1p7b.py")
    return dataclasses.replace(
        config,
        name="qwen3_0p6b",
        model=dataclasses.replace(
            config.model,
            d_model=1024,
            d_ff=3072,
        ),
    )
