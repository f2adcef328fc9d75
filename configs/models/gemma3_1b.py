"""Gemma 3 1B (text): its shape, in the setting of qwen3_1p7b.py."""

import dataclasses

from prefixmem_jax.config import Config
from prefixmem_jax.config_files import inherit


def get_config() -> Config:
    config = inherit(__file__, "qwen3_1p7b.py")
    return dataclasses.replace(
        config,
        name="gemma3_1b",
        data=dataclasses.replace(config.data, text_tokens=262_144),
        model=dataclasses.replace(
            config.model,
            layers=26,
            d_model=1152,
            d_ff=6912,
            query_heads=4,
            kv_heads=1,
            head_dim=256,
            activation="gelu_tanh",
            norm_plus_one=True,
            post_norms=True,
            scale_embedding=True,
            sliding_layers=tuple(n for n in range(26) if n % 6 != 5),
            sliding_window=512,
        ),
    )
