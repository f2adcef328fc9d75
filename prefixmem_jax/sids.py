"""From items to Semantic IDs: vectors, codes, collisions, and the report of what came of it."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import PositiveInt

from prefixmem_jax.config_files import override, to_json
from prefixmem_jax.data.formats.parquet import (
    HISTORIES,
    ITEMS,
    read_dataset,
    read_titles,
    write_items,
)
from prefixmem_jax.data.splits import split_dataset
from prefixmem_jax.errors import UserError
from prefixmem_jax.files import check_local, replacing, replacing_files, write_text
from prefixmem_jax.kinds import STRICT
from prefixmem_jax.parallel.mesh import make_mesh
from prefixmem_jax.semantic_ids.catalog import Catalog
from prefixmem_jax.semantic_ids.collisions import add_level, move_to_free
from prefixmem_jax.semantic_ids.quality import measure
from prefixmem_jax.semantic_ids.quantizers.quantizer import Fitted, Quantizer, level_name
from prefixmem_jax.semantic_ids.quantizers.residual_kmeans import ResidualKMeans
from prefixmem_jax.semantic_ids.report import write_report
from prefixmem_jax.semantic_ids.space import SidSpace
from prefixmem_jax.semantic_ids.texts import TextVectors
from prefixmem_jax.semantic_ids.vectors import Vectors, read_vectors

CONFIG, FITTED, CODEBOOKS = "sids_config.json", "quantizer.npz", "codebooks.npz"


@dataclass(frozen=True)
class SidsConfig:
    """How SIDs are made.

    Attributes:
      quantizer: what turns vectors into codes.
      collisions: what becomes of items that get the same SID: they keep it, get one more level that
        counts them, or all but one move to the nearest code that is free on the last level.
      text_width: of the vectors of titles, where there are no others.
    """

    __pydantic_config__ = STRICT

    quantizer: Quantizer = field(default_factory=ResidualKMeans)
    collisions: Literal["keep", "level", "move"] = "move"
    text_width: PositiveInt = 128


def make_sids(
    data: Path,
    out: Path,
    embeddings: Path | None,
    overrides: Sequence[str] = (),
    say: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Gives every item a SID, and writes a dataset that has them.

    Args:
      data: a folder with `items.parquet` (`item_id`, `title`), and maybe `histories.parquet`.
      out: gets items.parquet, the histories, codebooks.npz (for `init.codebooks`), quantizer.npz,
        sids_config.json, and the report: sids.json, sids.png, sids.html. A killed call goes on
        where it was.
      embeddings: the items' vectors, see `read_vectors`; vectors of titles where None.
      overrides: of `SidsConfig`, such as `quantizer.codes=(256,256,256)`.
      say: called with each line of progress.

    Returns:
      What the report measured.
    """
    config = SidsConfig()
    for text in overrides:
        config = override(config, text)
    check_local(out)
    titles, keys = read_titles(data)
    beside = out.absolute().parent
    if not beside.is_dir():
        raise UserError(f"{out}: no folder {beside}")
    unfinished = beside / f".{out.name}.fit.npz"
    unpacked = beside / f".{out.name}.vectors.npy"
    try:
        fitted: Fitted = {}
        if embeddings is None:
            say(f"vectors of {len(titles):,} titles ...")
            texts = TextVectors.fit(titles, config.text_width, config.quantizer.seed)
            vectors = Vectors(texts(titles), None, f"{data / ITEMS}: titles")
            fitted = {f"text_{name}": array for name, array in texts.arrays.items()}
        else:
            vectors = read_vectors(embeddings, len(titles), keys, unpacked)
        say(
            f"{config.quantizer.name}: {len(titles):,} vectors of {vectors.width} numbers to "
            f"{config.quantizer.levels} levels of {config.quantizer.codes} codes"
        )
        fitted |= _fit(config.quantizer, vectors, unfinished)
        measured = _write(config, data, out, (titles, keys), vectors, fitted)
    finally:
        unpacked.unlink(missing_ok=True)
    unfinished.unlink(missing_ok=True)
    return measured


def _fit(quantizer: Quantizer, vectors: Vectors, unfinished: Path) -> Fitted:
    """The codes, begun or taken up where an earlier call was killed."""
    about = hashlib.sha256(to_json(quantizer).encode())
    some = np.unique(np.linspace(0, vectors.count - 1, 1000).astype(int))
    about.update(vectors.take(some).tobytes() + str(vectors.count).encode())
    mine = np.frombuffer(about.digest(), np.uint8)
    saved: Fitted = {}
    if unfinished.exists():
        with np.load(unfinished) as arrays:
            saved = dict(arrays)
        if not np.array_equal(saved.pop("about"), mine):
            saved = {}

    def save(state: Fitted) -> None:
        with replacing(unfinished) as beside, beside.open("wb") as file:
            np.savez(file, about=mine, **state)

    return quantizer.fit(vectors, make_mesh(), saved, save)


def _write(
    config: SidsConfig,
    data: Path,
    out: Path,
    named: tuple[list[str | None], list[str] | None],
    vectors: Vectors,
    fitted: Fitted,
) -> dict[str, Any]:
    """Encodes all items, and writes what there is."""
    quantizer, mesh = config.quantizer, make_mesh()
    sids = np.empty((vectors.count, quantizer.levels), np.int32)
    for items, piece in vectors.pieces():
        sids[items] = quantizer.encode(fitted, piece, mesh)
    codes = quantizer.codes
    if config.collisions == "level":
        sids = add_level(sids)
        codes = (*codes, int(sids[:, -1].max()) + 1)
    elif config.collisions == "move":

        def last_distances(items: np.ndarray) -> np.ndarray:
            return quantizer.last_distances(fitted, vectors.take(items), sids[items])

        sids = move_to_free(sids, codes[-1], last_distances)
    titles, keys = named
    catalog = Catalog(sids, titles, SidSpace(codes), keys)
    with replacing_files(out, "SIDs", ITEMS) as folder:
        write_items(folder, catalog)
        trained_on = held_out = None
        if (data / HISTORIES).is_file():
            shutil.copy(data / HISTORIES, folder / HISTORIES)
            dataset = read_dataset(folder, codebook_sizes=codes)
            split = split_dataset(dataset, "leave_two_out", 0.1)
            trained_on = split.items[split.train.indices()]
            held_out = split.validation.targets
        measured = measure(
            sids,
            codes,
            trained_on,
            held_out,
            vectors,
            lambda some: quantizer.decode(fitted, some[:, : quantizer.levels]),
        )
        codebooks = {name: fitted[name] for name in map(level_name, range(quantizer.levels))}
        if len(codes) > quantizer.levels:  # counts mean nothing, so any directions will do
            rng = np.random.default_rng(quantizer.seed)
            shape = (codes[-1], vectors.width)
            codebooks[level_name(quantizer.levels)] = rng.normal(size=shape).astype(np.float32)
        np.savez(folder / CODEBOOKS, **codebooks)
        np.savez(folder / FITTED, **fitted)
        write_text(folder / CONFIG, to_json(config))
        write_report(folder, measured)
    return measured
