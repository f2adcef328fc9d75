"""A small decoder on SID tokens alone: what PrefixMem is compared with."""

from prefixmem_jax.config import Config
from prefixmem_jax.config_groups import (
    CheckpointConfig,
    DataConfig,
    DecoderConfig,
    EvaluationConfig,
    OptimizerConfig,
)
from prefixmem_jax.objectives.next_token import NextToken


def get_config() -> Config:
    return Config(
        name="baseline",
        objective=NextToken(),
        steps=300,
        data=DataConfig(max_items=20, sequence_length=128, batch_size=40),
        model=DecoderConfig(layers=2, d_model=96, d_ff=256, query_heads=4, kv_heads=2, head_dim=24),
        sid_encoder=None,
        # The best of docs/results.md's grid for this system, as in prefixmem.py for that one.
        optimizer=OptimizerConfig(learning_rate=1e-2, warmup_steps=50),
        checkpoint=CheckpointConfig(every_steps=250),
        evaluation=EvaluationConfig(every_steps=50, validation_examples=1000, users=10_000),
    )
