"""The recommender's recipe: memory across items, which scores whole items too; dropout.

The best checkpoint by validation is kept.
Chosen on Beauty's validation users. For your data: data.path=DIR.
"""

from prefixmem_jax.config import Config
from prefixmem_jax.config_groups import (
    CheckpointConfig,
    DataConfig,
    DecoderConfig,
    EvaluationConfig,
    ItemHeadConfig,
    MemoryOptimizerConfig,
    OptimizerConfig,
)
from prefixmem_jax.sid_encoders.prefix_memory import PrefixMemoryConfig


def get_config() -> Config:
    return Config(
        name="recommend",
        steps=3900,
        data=DataConfig(shared_sids="move", max_items=20, sequence_length=128, batch_size=40),
        model=DecoderConfig(
            layers=2, d_model=64, d_ff=192, query_heads=2, kv_heads=2, head_dim=32, dropout=0.3
        ),
        sid_encoder=PrefixMemoryConfig(
            target_levels=(1, 3, 4), orders=4, heads=2, rows=2**15, d_mem=64, dropout=0.3
        ),
        item_head=ItemHeadConfig(vectors="memory", weight=2.0, negatives=8192),
        optimizer=OptimizerConfig(
            learning_rate=3e-3,
            warmup_steps=100,
            weight_decay=0.0,
            memory=MemoryOptimizerConfig(rate=1.0),
        ),
        checkpoint=CheckpointConfig(every_steps=300),
        evaluation=EvaluationConfig(
            every_steps=300,
            validation_examples=4000,
            select_by="item_ndcg@10",
            item_share=0.95,
            transition_share=0.4,
        ),
    )
