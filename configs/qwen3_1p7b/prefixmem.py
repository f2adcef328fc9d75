"""The paper's main setting: Qwen3-1.7B's shape, SIDs of 5 levels x 2048 codes, 5M-row tables.

The batch is 4 rows of 1024 tokens a chip on 16 chips; set data.batch_size for other pods, and
data.path for your data.
"""

from prefixmem_jax.config import (
    CheckpointConfig,
    Config,
    DataConfig,
    DecoderConfig,
    MemoryOptimizerConfig,
    MeshConfig,
    OptimizerConfig,
    PrefixMemoryConfig,
)


def get_config() -> Config:
    return Config(
        name="qwen3_1p7b_prefixmem",
        steps=50_000,
        log_every_steps=100,
        data=DataConfig(
            codebook_sizes=(2048,) * 5,
            text_tokens=151_936,
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
            remat=True,
        ),
        encoder=PrefixMemoryConfig(target_levels=(4, 5), orders=4, heads=4, rows=5_000_000),
        optimizer=OptimizerConfig(
            learning_rate=1e-4,
            warmup_steps=1000,
            memory=MemoryOptimizerConfig(kind="adam", rate=5.0),
        ),
        mesh=MeshConfig(data=-1, fsdp=16, tensor=1),
        checkpoint=CheckpointConfig(every_steps=1000),
    )
