"""SASRec, to compare with: the same decoder over whole items, one token each.

Items' own ids stand for SIDs of one level, tokens' vectors are shared by input and output, and the
loss is a full softmax over items.
"""

import dataclasses

from prefixmem_jax.config import Config
from prefixmem_jax.config_files import inherit


def get_config() -> Config:
    recipe = inherit(__file__, "base.py")
    return dataclasses.replace(
        recipe,
        name="sasrec",
        data=dataclasses.replace(recipe.data, sid_column="item_id", sequence_length=64),
        model=dataclasses.replace(recipe.model, dropout=0.5, tied_embeddings=True),
        sid_encoder=None,
        item_head=None,
    )
