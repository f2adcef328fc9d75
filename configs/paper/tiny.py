"""The paper's comparison in minutes a row on two CPU cores: its baseline, on flat SID tokens.

Data for it: `prefixmem paper` generates 524,288 items of 5 levels, most of whose prefixes of four
codes are met a handful of times in the one epoch that is trained.
"""

from prefixmem_jax.config import Config
from prefixmem_jax.config_groups import (
    CheckpointConfig,
    DataConfig,
    DecoderConfig,
    EvaluationConfig,
    OptimizerConfig,
)


def get_config() -> Config:
    return Config(
        name="baseline",
        steps=600,
        data=DataConfig(
            codebook_sizes=(256,) * 5,
            split="users",
            holdout=0.05,
            max_items=20,
            sequence_length=128,
            batch_size=40,
        ),
        model=DecoderConfig(layers=2, d_model=64, d_ff=192, query_heads=2, kv_heads=2, head_dim=32),
        sid_encoder=None,
        optimizer=OptimizerConfig(learning_rate=1e-2, warmup_steps=50),
        checkpoint=CheckpointConfig(every_steps=300),
        evaluation=EvaluationConfig(
            every_steps=100, validation_examples=2000, users=1000, beam=100, exclude_seen=False
        ),
    )
