"""Titles and SIDs together, the paper's three kinds of documents, in minutes on two CPU cores.

For your data, whose items have titles:
  prefixmem data tokenizer DIR --tokens 2000 --out DIR/tokenizer
  prefixmem train titles/small data.path=DIR data.tokenizer=DIR/tokenizer
"""

from prefixmem_jax.config import Config
from prefixmem_jax.config_groups import (
    CheckpointConfig,
    DataConfig,
    DecoderConfig,
    EvaluationConfig,
    OptimizerConfig,
)
from prefixmem_jax.data.documents.interleaved import Interleaved
from prefixmem_jax.data.documents.items import Items
from prefixmem_jax.data.documents.pair import Pair
from prefixmem_jax.objectives.next_token import NextToken
from prefixmem_jax.sid_encoders.prefix_memory import PrefixMemoryConfig


def get_config() -> Config:
    return Config(
        name="titles",
        objective=NextToken(documents=(Interleaved(), Pair(), Items())),
        steps=2000,
        data=DataConfig(
            text_tokens=2000, text_length=24, max_items=20, sequence_length=256, batch_size=24
        ),
        model=DecoderConfig(
            layers=2, d_model=128, d_ff=384, query_heads=4, kv_heads=2, head_dim=32, dropout=0.1
        ),
        sid_encoder=PrefixMemoryConfig(
            target_levels=(3, 4), orders=3, heads=2, rows=2**15, d_mem=64, dropout=0.1
        ),
        optimizer=OptimizerConfig(learning_rate=3e-3, warmup_steps=100),
        checkpoint=CheckpointConfig(every_steps=500),
        evaluation=EvaluationConfig(every_steps=500, validation_examples=2000),
    )
