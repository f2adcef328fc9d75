"""The recommender's recipe in minutes on two CPU cores."""

import dataclasses

from prefixmem_jax.config import Config
from prefixmem_jax.config_files import inherit


def get_config() -> Config:
    recipe = inherit(__file__, "base.py")
    return dataclasses.replace(
        recipe,
        name="prefixmem",
        steps=1000,
        checkpoint=dataclasses.replace(recipe.checkpoint, every_steps=250),
        evaluation=dataclasses.replace(
            recipe.evaluation, every_steps=250, validation_examples=2000
        ),
    )
