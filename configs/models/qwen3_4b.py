"""Qwen3-4B: its shape, in the setting of qwen3_1p7b.py."""

import dataclasses

from prefixmem_jax.config import Config
from prefixmem_jax.config_files import inherit


def get_config() -> Config:
    config = inherit(__file__, "qwen3_1p7b.py")
    return dataclasses.replace(
        config,
        name="qwen3_4b",
        model=dataclasses.replace(
            config.model,
            layers=36,
            d_model=2560,
            d_ff=9728,
            query_heads=32,
        ),
    )
