"""Qwen3-0.6B: its shape, in the setting of qwen3_1p7b.py."""

import dataclasses

from qwen3_1p7b import get_config as paper_default

from prefixmem_jax.config import Config


def get_config() -> Config:
    config = paper_default()
    return dataclasses.replace(
        config,
        name="qwen3_0p6b",
        model=dataclasses.replace(
            config.model,
            d_model=1024,
            d_ff=3072,
        ),
    )
