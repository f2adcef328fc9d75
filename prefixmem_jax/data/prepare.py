"""From a data config to a checked, split dataset."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from prefixmem_jax.config import DataConfig
from prefixmem_jax.data.formats.parquet import Dataset, load_dataset
from prefixmem_jax.data.splits import Split, split_dataset
from prefixmem_jax.data.synthetic import SyntheticProcess, make_synthetic
from prefixmem_jax.errors import UserError
from prefixmem_jax.semantic_ids.catalog import Catalog
from prefixmem_jax.semantic_ids.space import SPECIAL_TOKENS, SidSpace


@dataclass(frozen=True)
class PreparedData:
    """A dataset and its split; `world` is what made it, where it is synthetic."""

    dataset: Dataset
    split: Split
    world: SyntheticProcess | None

    @property
    def catalog(self) -> Catalog:
        return self.dataset.catalog

    @cached_property
    def item_counts(self) -> np.ndarray:
        """Occurrences of every item in training, int64 [items]."""
        return self.split.item_counts(len(self.catalog))


def data_space(config: DataConfig) -> SidSpace:
    """The data's SID space; reads the data only where the config does not state the codebooks."""
    if config.codebook_sizes is not None:
        sizes = config.codebook_sizes
    elif config.path is None:
        sizes = config.synthetic.codebook_sizes
    else:
        sizes = load_dataset(config.path, config.sid_column).catalog.space.codebook_sizes
    return _in_vocabulary(config, SidSpace(tuple(sizes)))


def _in_vocabulary(config: DataConfig, space: SidSpace) -> SidSpace:
    return dataclasses.replace(
        space,
        token_offset=config.text_tokens + SPECIAL_TOKENS,
        vocabulary_multiple=config.vocabulary_multiple,
    )


def prepare_data(config: DataConfig) -> PreparedData:
    """Loads (or generates) the dataset and splits it; the config fixes every choice."""
    world = None
    if config.path is None:
        if config.codebook_sizes not in (None, config.synthetic.codebook_sizes):
            raise UserError(
                f"data.path is none, but data.codebook_sizes={config.codebook_sizes}: set "
                "data.path to the dataset that has these SIDs (docs/data.md)"
            )
        dataset, world = make_synthetic(config.synthetic)
    else:
        dataset = load_dataset(config.path, config.sid_column, config.codebook_sizes)
    catalog = dataset.catalog
    catalog = catalog.in_space(_in_vocabulary(config, catalog.space))
    dataset = dataclasses.replace(dataset, catalog=catalog)
    return PreparedData(dataset, split_dataset(dataset, config.split, config.holdout), world)


def fixed_sample(examples: list, count: int) -> list:
    """At most `count` examples (0: all), the same ones for every run and seed, in order."""
    if count == 0 or count >= len(examples):
        return examples
    chosen = np.random.default_rng(0).choice(len(examples), count, replace=False)
    return [examples[i] for i in sorted(chosen)]
