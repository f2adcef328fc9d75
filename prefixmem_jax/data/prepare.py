"""From a data config to a checked, split dataset."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from types import ModuleType
from typing import NamedTuple, Protocol

import numpy as np

from prefixmem_jax.config_groups import DataConfig
from prefixmem_jax.data.dataset import ITEM_ID, Dataset
from prefixmem_jax.data.splits import (
    Examples,
    Ranges,
    Split,
    check_some,
    cut_times,
    split_dataset,
    split_histories,
)
from prefixmem_jax.data.synthetic import SyntheticProcess, make_synthetic, synthetic_catalog
from prefixmem_jax.errors import UserError
from prefixmem_jax.kinds import find_module
from prefixmem_jax.semantic_ids.catalog import Catalog
from prefixmem_jax.semantic_ids.collisions import move_to_next_free
from prefixmem_jax.semantic_ids.space import SidSpace
from prefixmem_jax.semantic_ids.vocabulary import Vocabulary

FORMATS = "prefixmem_jax.data.formats"


class DataFacts(NamedTuple):
    """What a run notes of its data.

    Attributes:
      sha256: of all; catalogue_sha256: of what there is of the items.
      items, users: how many.
    """

    name: str
    sha256: str
    catalogue_sha256: str
    items: int
    users: int


class TrainingData(Protocol):
    """What every training asks of its data; their objective knows what else there is."""

    @property
    def vocabulary(self) -> Vocabulary: ...

    @property
    def facts(self) -> DataFacts: ...


@dataclass(frozen=True)
class PreparedData:
    """A dataset, its split and its tokens; `process` is what made it, where it is synthetic."""

    dataset: Dataset
    split: Split
    vocabulary: Vocabulary
    process: SyntheticProcess | None = None

    @property
    def catalog(self) -> Catalog:
        return self.dataset.catalog

    @property
    def facts(self) -> DataFacts:
        dataset, catalog = self.dataset, self.catalog
        return DataFacts(
            dataset.name, dataset.sha256, catalog.sha256, len(catalog), len(dataset.histories)
        )

    @property
    def item_tokens(self) -> np.ndarray:
        """SID tokens of every item, int32 [items, levels]."""
        return self.vocabulary.item_tokens

    @property
    def item_counts(self) -> np.ndarray:
        """Occurrences of every item in training, int64 [items]."""
        return self.vocabulary.item_counts


@dataclass(frozen=True)
class StoredData:
    """A dataset whose histories are read and split a piece at a time.

    Attributes:
      cuts: `cut_times` of all histories.
    """

    dataset: Dataset
    vocabulary: Vocabulary
    config: DataConfig
    cuts: np.ndarray

    def piece(self, first: int, stop: int) -> PreparedData:
        """The users from the first up to the last, split as all are."""
        histories = self.dataset.histories.piece(first, stop)
        split = split_histories(histories, self.config.split, self.config.holdout, self.cuts)
        return _prepared(replace(self.dataset, histories=histories), split, self.vocabulary)

    def bounds(self, first: int, stop: int, interactions: int) -> np.ndarray:
        """Cuts users into pieces of about so many interactions: where each starts, and the end."""
        offsets = self.dataset.histories.offsets
        count = -(-int(offsets[stop] - offsets[first]) // interactions)
        ends = np.linspace(offsets[first], offsets[stop], count + 1)[1:-1]
        inner = np.searchsorted(offsets[: stop + 1], ends)
        return np.unique(np.concatenate([[first], inner, [stop]]))

    def validation_alone(self, examples: int) -> PreparedData:
        """Without training and test histories, but for the counts of items, and of validation
        `fixed_sample`'s examples alone.

        Args:
          examples: how many at most; 0: all.
        """
        bounds = self.bounds(0, len(self.dataset.histories), PIECE)
        places = list(itertools.pairwise(bounds.tolist()))
        counts, held_out = np.zeros(len(self.dataset.catalog), np.int64), []
        for place in places:
            piece = self.piece(*place)
            counts += piece.item_counts
            held_out.append(len(piece.split.validation))
        ends = np.cumsum(held_out)
        check_some(int(ends[-1]), "validation", self.dataset.name, self.config.split)
        sample = fixed_sample(int(ends[-1]), examples)
        parts = np.split(sample, np.searchsorted(sample, ends[:-1]))
        items, users, lengths = [], [], []
        for (first, stop), end, part in zip(places, ends, parts, strict=True):
            if len(part):
                everyone = self.piece(first, stop).split.validation
                chosen = everyone.take(part - (end - len(everyone)))
                ranges = Ranges(chosen.starts, chosen.targets_at + 1)
                items.append(chosen.items[ranges.indices()])
                users.append(first + chosen.users)
                lengths.append(ranges.lengths)
        flat, stops = np.concatenate(items), np.cumsum(np.concatenate(lengths))
        starts = np.concatenate([[0], stops[:-1]])
        validation = Examples(flat, np.concatenate(users), starts, stops - 1)
        nothing = np.zeros(0, np.int64)
        split = Split(flat, Ranges(nothing, nothing), validation, validation.take(nothing))
        return PreparedData(self.dataset, split, replace(self.vocabulary, item_counts=counts))


# Interactions that are split and packed at a time.
PIECE = 1 << 18


def prepare_data(config: DataConfig) -> PreparedData:
    """Reads (or generates) the dataset and splits it; the config fixes every choice."""
    dataset, process = _read(config, "read_dataset")
    split = split_dataset(dataset, config.split, config.holdout)
    return _prepared(dataset, split, _vocabulary(config, dataset.catalog), process)


def _prepared(
    dataset: Dataset,
    split: Split,
    vocabulary: Vocabulary,
    process: SyntheticProcess | None = None,
) -> PreparedData:
    """With the training's occurrences of items counted."""
    counts = split.item_counts(len(dataset.catalog))
    return PreparedData(dataset, split, replace(vocabulary, item_counts=counts), process)


def open_data(config: DataConfig) -> StoredData:
    """As `prepare_data`, its histories left in their file where the format can do so."""
    dataset, _ = _read(config, "open_dataset")
    cuts = cut_times(dataset.histories, config.split, config.holdout)
    return StoredData(dataset, _vocabulary(config, dataset.catalog), config, cuts)


def _read(config: DataConfig, how: str) -> tuple[Dataset, SyntheticProcess | None]:
    """The dataset, its catalogue as the config wants it, and the process that made it."""
    process = None
    if config.path is None:
        _check_synthetic(config)
        dataset, process = make_synthetic(config.synthetic)
        dataset = replace(dataset, catalog=_recoded(config, dataset.catalog))
    else:
        module = _format(config)
        read = getattr(module, how, module.read_dataset)
        dataset = read(config.path, config.sid_column, config.codebook_sizes)
        _check_codebooks(config, dataset.catalog)
    return replace(dataset, catalog=_told_apart(config, dataset.catalog)), process


def load_catalog(config: DataConfig) -> Catalog:
    """The catalogue alone; no history is read."""
    if config.path is None:
        _check_synthetic(config)
        catalog = _recoded(config, synthetic_catalog(config.synthetic))
    else:
        options = config.sid_column, config.codebook_sizes
        catalog = _format(config).read_catalog(config.path, *options)
        _check_codebooks(config, catalog)
    return _told_apart(config, catalog)


def data_vocabulary(config: DataConfig) -> Vocabulary:
    """The data's tokens; reads the catalogue only where the config does not state codebooks.

    Items whose SIDs are not read have zeros for them, which is enough where only shapes matter.
    """
    items = config.items or 0
    if config.codebook_sizes is not None:
        space = SidSpace(tuple(config.codebook_sizes))
    elif config.path is None:
        items = config.synthetic.items
        space = SidSpace(
            (items,) if config.sid_column == ITEM_ID else tuple(config.synthetic.codebook_sizes)
        )
    else:
        return _vocabulary(config, load_catalog(config))
    sids = np.zeros((items, space.levels), np.int32) if items else None
    return Vocabulary(space, config.text_tokens, config.vocabulary_multiple, items, sids)


def _recoded(config: DataConfig, catalog: Catalog) -> Catalog:
    """A synthetic catalogue with the SIDs that are asked for."""
    if config.sid_column != ITEM_ID:
        return catalog
    items = len(catalog)
    return Catalog(np.arange(items)[:, None], catalog.titles, SidSpace((items,)), catalog.keys)


def _told_apart(config: DataConfig, catalog: Catalog) -> Catalog:
    """The catalogue with what becomes of items that share a SID."""
    if config.shared_sids == "keep" or len(catalog.group_sizes) == len(catalog):
        return catalog
    sids = move_to_next_free(catalog.sids, catalog.space.codebook_sizes[-1])
    return Catalog(sids, catalog.titles, catalog.space, catalog.keys)


def _vocabulary(config: DataConfig, catalog: Catalog) -> Vocabulary:
    return Vocabulary(
        catalog.space, config.text_tokens, config.vocabulary_multiple, len(catalog), catalog.sids
    )


def _format(config: DataConfig) -> ModuleType:
    """The module that reads the dataset."""
    module = find_module(FORMATS, config.format, "data.format")
    for name in ("read_dataset", "read_catalog"):
        if not callable(getattr(module, name, None)):
            raise UserError(
                f"data.format={config.format}: {module.__name__} has no function {name}; a format "
                "is a module with read_dataset and read_catalog (docs/data.md)"
            )
    return module


def _check_synthetic(config: DataConfig) -> None:
    if config.codebook_sizes not in (None, config.synthetic.codebook_sizes):
        raise UserError(
            f"data.path is none, but data.codebook_sizes={config.codebook_sizes}: set "
            "data.path to the dataset that has these SIDs (docs/data.md)"
        )


def _check_codebooks(config: DataConfig, catalog: Catalog) -> None:
    """Whether a format kept to the codebooks that it was given: `data_vocabulary` relies on it."""
    sizes = catalog.space.codebook_sizes
    if config.codebook_sizes not in (None, sizes):
        raise UserError(
            f"data.format={config.format}: read codebooks of {sizes}, "
            f"data.codebook_sizes={config.codebook_sizes}"
        )


def fixed_sample(examples: int, count: int) -> np.ndarray:
    """Indices of at most `count` examples (0: all), int64: for every run and seed the same."""
    if count == 0 or count >= examples:
        return np.arange(examples)
    return np.sort(np.random.default_rng(0).choice(examples, count, replace=False))
