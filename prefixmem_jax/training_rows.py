"""What a config's training draws its batches from: rows packed in memory, or in files before."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from prefixmem_jax.config import Config
from prefixmem_jax.data.batch import Rows
from prefixmem_jax.data.documents.document import Corpus
from prefixmem_jax.data.pipeline import RowsInMemory, RowSource
from prefixmem_jax.data.prepare import PIECE, PreparedData, StoredData, TrainingData, open_data
from prefixmem_jax.data.shards import INDEX, PackedShards, in_processes, write_shards
from prefixmem_jax.data.texts import tokenizer_sha256
from prefixmem_jax.errors import UserError
from prefixmem_jax.files import replacing_files
from prefixmem_jax.progress import progress_bar
from prefixmem_jax.storage import is_remote, to_path

# Of the group `data`, what rows depend on; the dataset itself is known by its digest.
KEYS = ("sid_column", "shared_sids", "split", "holdout", "text_tokens", "text_length")
KEYS += ("max_items", "sequence_length")


def training_source(config: Config, data: TrainingData) -> RowSource:
    """All rows that a config trains on.

    Raises:
      UserError: `data.packed` holds none, or rows of other data or keys.
    """
    if config.data.packed is None:
        return RowsInMemory(config.objective.training_rows(Corpus(data, config.data), config.seed))
    like = config.objective.abstract_batch(config.data)
    return PackedShards(config.data.packed, like, _made_from(config, data))


def needed_data(config: Config) -> tuple:
    """All that `training_data` depends on."""
    evaluation = config.evaluation
    counts = evaluation.transition_share > 0
    return type(config.objective), config.data, counts, evaluation.validation_examples


def training_data(config: Config) -> TrainingData:
    """What training needs of a config's data: few histories, where rows are packed.

    But to count what stands next to what it needs all of them.
    """
    if config.data.packed is None or config.evaluation.transition_share > 0:
        return config.objective.prepare(config.data)
    return open_data(config.data).validation_alone(config.evaluation.validation_examples)


def pack(config: Config, out: Path, shards: int, workers: int) -> int:
    """Packs a config's training rows into so many files, several at a time.

    JAX may not have started: the processes that do it are forked.

    Args:
      out: an earlier packing there is replaced.

    Returns:
      How many rows there are.

    Raises:
      UserError: more files than training sequences, or what the documents refuse.
    """
    if config.data.path is not None and is_remote(to_path(config.data.path)):
        raise UserError(
            f"data.path={config.data.path}: packing reads a folder of this machine; copy it first"
        )
    data = open_data(config.data)
    users = len(data.dataset.histories)
    if shards > users:
        raise UserError(f"--shards {shards}: there are {users} users; expected no more files")
    ends = [users * shard // shards for shard in range(shards + 1)]
    bounds = [data.bounds(*place, PIECE).tolist() for place in itertools.pairwise(ends)]
    numbers = list(itertools.accumulate((len(some) - 1 for some in bounds), initial=0))
    source = _made_from(config, data)

    def corpora(shard: int) -> Iterator[Corpus]:
        for part, place in enumerate(itertools.pairwise(bounds[shard]), numbers[shard]):
            yield Corpus(data.piece(*place), config.data, part, numbers[-1])

    def count(shard: int) -> list[tuple[int, ...]]:
        return [config.objective.count_documents(corpus) for corpus in corpora(shard)]

    counts = None
    if config.objective.mixes_documents and numbers[-1] > 1:
        by_part = []
        with progress_bar(shards, "counting documents", "file") as bar:
            for some in in_processes(count, shards, workers):
                by_part += some
                bar.update()
        counts = tuple(np.sum(by_part, axis=0).tolist())
    with (
        replacing_files(out, "packed", last=INDEX) as staged,
        progress_bar(shards, "packing", "file") as bar,
    ):

        def rows_of(shard: int) -> Iterator[Rows]:
            for corpus in corpora(shard):
                yield config.objective.training_rows(replace(corpus, counts=counts), config.seed)

        return write_shards(staged, rows_of, shards, workers, source, bar.update)


def _made_from(config: Config, data: PreparedData | StoredData) -> dict[str, Any]:
    """What rows depend on, as JSON has it."""
    tokenizer = config.data.tokenizer
    content = {
        "dataset": data.dataset.sha256,
        "codebook_sizes": data.vocabulary.space.codebook_sizes,
        "tokenizer": None if tokenizer is None else tokenizer_sha256(tokenizer),
        "documents": config.objective.rows_depend_on,
        "seed": config.seed,
        **{f"data.{key}": getattr(config.data, key) for key in KEYS},
    }
    return json.loads(json.dumps(content))
