"""The paper's comparison on one GPU: a decoder of about 100M parameters, 5 x 2048 codes.

Data for it: `prefixmem paper` generates 16.8M items and 4M users.
"""

import dataclasses

from prefixmem_jax.config import Config
from prefixmem_jax.config_files import inherit
from prefixmem_jax.config_groups import DecoderConfig


def get_config() -> Config:
    tiny = inherit(__file__, "tiny.py")
    return dataclasses.replace(
        tiny,
        steps=6000,
        data=dataclasses.replace(
            tiny.data,
            codebook_sizes=(2048,) * 5,
            holdout=0.002,
            max_items=32,
            sequence_length=512,
            batch_size=64,
        ),
        model=DecoderConfig(
            layers=12,
            d_model=768,
            d_ff=2304,
            query_heads=12,
            kv_heads=4,
            head_dim=64,
            compute_dtype="bfloat16",
        ),
        optimizer=dataclasses.replace(tiny.optimizer, learning_rate=1e-3, warmup_steps=300),
        checkpoint=dataclasses.replace(tiny.checkpoint, every_steps=1000),
        evaluation=dataclasses.replace(tiny.evaluation, every_steps=500),
    )
