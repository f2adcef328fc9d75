"""The paper's main model: Qwen3-1.7B's shape, SIDs of 5 levels x 2048 codes, its larger tables of
5M rows.

The batch is 4 rows of 1024 tokens a chip on 16 chips; set data.batch_size for other pods, and
data.path for your data. Of the layers it keeps what chips of 16 GiB have room for (docs/pods.md).
"""

import dataclasses

from prefixmem_jax.config import Config
from prefixmem_jax.config_files import inherit
from prefixmem_jax.sid_encoders.prefix_memory import PrefixMemoryConfig


def get_config() -> Config:
    config = inherit(__file__, "../models/qwen3_1p7b.py")
    return dataclasses.replace(
        config,
        name="qwen3_1p7b_prefixmem",
        model=dataclasses.replace(config.model, remat="dots", scan_layers=False),
        sid_encoder=PrefixMemoryConfig(target_levels=(4, 5), orders=4, heads=4, rows=5_000_000),
    )
