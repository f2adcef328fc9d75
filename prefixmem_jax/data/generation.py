"""Writes a generated dataset, piece by piece, and what the best model could do on it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from prefixmem_jax.data.formats.parquet import ITEMS, write_pieces
from prefixmem_jax.data.generator import CHUNK, Generator, GeneratorConfig
from prefixmem_jax.files import replacing_files, write_json
from prefixmem_jax.progress import progress_bar

ABOUT = "generated.json"
# Users whose last items the optimum is computed of.
JUDGED = 4096


def generate(config: GeneratorConfig, out: Path) -> dict[str, Any]:
    """Writes items.parquet, histories.parquet, and generated.json: config and optimum.

    Args:
      out: an earlier dataset that was generated there is replaced.

    Returns:
      items, interactions, and by level optimum and prefix_optimum, which `Generator.optimum` says.
    """
    generator, interactions = Generator(config), 0
    best, alone = generator.optimum(generator.draw(JUDGED, (config.seed, 1, 1)))

    def histories(count: Callable[[int], Any]) -> Iterator[dict[str, Any]]:
        nonlocal interactions
        first = 0
        for users in generator.users():
            there = np.arange(users.digits.shape[1]) < users.lengths[:, None]
            items = generator.nodes(users.digits, config.levels)[there]
            names = [str(user) for user in range(first, first + len(users.lengths))]
            yield {"user_id": names, "item_ids": (users.lengths, items)}
            interactions += len(items)
            first += len(names)
            count(len(names))

    with replacing_files(out, "generated dataset", last=ITEMS) as folder:
        with progress_bar(config.users, "users", "user") as bar:
            write_pieces(folder, "histories", histories(bar.update))
        with progress_bar(config.items, "items", "item") as bar:
            write_pieces(folder, "items", _items(generator, bar.update))
        about = {
            "items": config.items,
            "interactions": interactions,
            "optimum": best.tolist(),
            "prefix_optimum": [None if np.isnan(x) else float(x) for x in alone],
        }
        write_json(folder / ABOUT, {**about, "config": vars(config)})
    return about


def _items(generator: Generator, count: Callable[[int], Any]) -> Iterator[dict[str, Any]]:
    for first in range(0, generator.config.items, CHUNK):
        items = np.arange(first, min(first + CHUNK, generator.config.items))
        codes = generator.codes(generator.item_digits(items))
        piece = {"item_id": items, "sid": codes}
        if generator.config.titles:
            piece["title"] = generator.titles(codes)
        yield piece
        count(len(items))
