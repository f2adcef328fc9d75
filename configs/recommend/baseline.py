"""What the memory is compared with: the same decoder, item head, dropout and steps without it.

The item head has a vector of its own for every item, since there is no memory to read them from.
"""

import dataclasses

from prefixmem_jax.config import Config
from prefixmem_jax.config_files import inherit


def get_config() -> Config:
    recipe = inherit(__file__, "small.py")
    return dataclasses.replace(
        recipe,
        name="baseline",
        sid_encoder=None,
        item_head=dataclasses.replace(recipe.item_head, vectors="own", negatives=None),
    )
