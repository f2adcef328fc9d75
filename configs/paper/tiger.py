"""TIGER at the paper's size, 35M parameters without the memory: what `paper.py` compares there.

An encoder and a decoder of 6 layers each that speak SIDs alone.
"""

import dataclasses

from prefixmem_jax.config import Config
from prefixmem_jax.config_files import inherit
from prefixmem_jax.config_groups import DecoderConfig
from prefixmem_jax.data.documents.next_item import NextItem
from prefixmem_jax.objectives.tiger import Tiger


def get_config() -> Config:
    config = inherit(__file__, "paper.py")
    return dataclasses.replace(
        config,
        name="tiger",
        objective=Tiger(documents=(NextItem(draws=1),), encoder_layers=6, answers=8),
        data=dataclasses.replace(config.data, text_tokens=0),
        model=DecoderConfig(
            layers=6,
            d_model=384,
            d_ff=1152,
            query_heads=6,
            kv_heads=6,
            head_dim=64,
            compute_dtype="bfloat16",
        ),
    )
