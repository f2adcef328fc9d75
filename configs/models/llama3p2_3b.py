"""Llama 3.2 3B: its shape, in the setting of qwen3_1p7b.py."""

import dataclasses

from prefixmem_jax.config import Config
from prefixmem_jax.config_files import inherit
from prefixmem_jax.config_groups import RopeScalingConfig


def get_config() -> Config:
    config = inherit(__file__, "qwen3_1p7b.py")
    return dataclasses.replace(
        config,
        name="llama3p2_3b",
        data=dataclasses.replace(config.data, text_tokens=128_256),
        model=dataclasses.replace(
            config.model,
            layers=28,
            d_model=3072,
            d_ff=8192,
            query_heads=24,
            kv_heads=8,
            head_dim=128,
            qk_norm=False,
            rope_base=500_000.0,
            rope_scaling=RopeScalingConfig("llama3", factor=32.0),
            norm_epsilon=1e-5,
        ),
    )
