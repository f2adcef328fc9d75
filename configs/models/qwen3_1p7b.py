"""Qwen3-1.7B: its shape, on flat SID tokens, in the paper's setting.

The batch is 4 rows of 1024 tokens a chip on 16 chips; set data.batch_size for other pods, data.path
for your data, and init.from_huggingface to start from its weights.
"""

from prefixmem_jax.config import Config
from prefixmem_jax.config_groups import (
    CheckpointConfig,
    DataConfig,
    DecoderConfig,
    MeshConfig,
    OptimizerConfig,
)


def get_config() -> Config:
    return Config(
        name="qwen3_1p7b",
        steps=50_000,
        log_every_steps=100,
        data=DataConfig(
            codebook_sizes=(2048,) * 5,
            text_tokens=151_936,
            vocabulary_multiple=128,
            max_items=32,
            sequence_length=1024,
            batch_size=64,
        ),
        model=DecoderConfig(
            layers=28,
            d_model=2048,
            d_ff=6144,
            query_heads=16,
            kv_heads=8,
            head_dim=128,
            tied_embeddings=True,
            rope_base=1e6,
            compute_dtype="bfloat16",
            remat="full",
        ),
        optimizer=OptimizerConfig(learning_rate=1e-4, warmup_steps=1000),
        mesh=MeshConfig(data=-1, fsdp=16, tensor=1),
        checkpoint=CheckpointConfig(every_steps=1000),
    )
