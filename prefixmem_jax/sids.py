"""From items to Semantic IDs: vectors, codes, collisions, and the report of what came of it."""

from __future__ import annotations

import shutil
import tempfile
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import PositiveInt

from prefixmem_jax.config_files import override, read_config, to_json
from prefixmem_jax.config_groups import DataConfig
from prefixmem_jax.data.formats.parquet import (
    HISTORIES,
    ITEMS,
    read_catalog,
    read_dataset,
    read_titles,
    write_items,
)
from prefixmem_jax.data.prepare import prepare_data
from prefixmem_jax.data.splits import Split, split_dataset
from prefixmem_jax.errors import UserError
from prefixmem_jax.files import reading_npz, replacing_files, write_npz, write_text
from prefixmem_jax.kinds import STRICT
from prefixmem_jax.parallel.mesh import make_mesh
from prefixmem_jax.progress import progress_bar
from prefixmem_jax.quantizer_training import fit_quantizer, fitted_to
from prefixmem_jax.semantic_ids.catalog import Catalog
from prefixmem_jax.semantic_ids.collisions import add_level, move_to_free
from prefixmem_jax.semantic_ids.quality import measure
from prefixmem_jax.semantic_ids.quantizers.quantizer import Fitted, Quantizer, level_name
from prefixmem_jax.semantic_ids.quantizers.residual_kmeans import ResidualKMeans
from prefixmem_jax.semantic_ids.report import PAGE, write_report
from prefixmem_jax.semantic_ids.space import SidSpace
from prefixmem_jax.semantic_ids.text_models import embed_titles
from prefixmem_jax.semantic_ids.texts import TextVectors
from prefixmem_jax.semantic_ids.vectors import Vectors, read_vectors
from prefixmem_jax.storage import check_local, remove_folder

# Titles and keys of the items, as `read_titles`.
Named = tuple[list[str | None], list[str] | None]

CONFIG, FITTED, CODEBOOKS = "sids_config.json", "quantizer.npz", "codebooks.npz"
FITTED_TO = "fitted_to.txt"


@dataclass(frozen=True)
class SidsConfig:
    """How SIDs are made.

    Attributes:
      quantizer: what turns vectors into codes.
      collisions: what becomes of items that get the same SID: they keep it, get one more level that
        counts them, or all but one move to the nearest code that is free on the last level.
      text_model: folder of a text encoder (sentence-transformers or transformers) that makes
        vectors of titles; none means hashed words, which need no model.
      text_width: of the vectors of hashed words.
    """

    __pydantic_config__ = STRICT

    quantizer: Quantizer = field(default_factory=ResidualKMeans)
    collisions: Literal["keep", "level", "move"] = "move"
    text_model: str | None = None
    text_width: PositiveInt = 128


@dataclass(frozen=True)
class ReportConfig:
    """Which SIDs are reported on, and how histories are split: `data`'s keys of a training."""

    __pydantic_config__ = STRICT

    data: DataConfig


def make_sids(
    data: Path,
    out: Path,
    embeddings: Path | None,
    overrides: Sequence[str] = (),
    say: Callable[[str], None] = lambda text: None,
    earlier: Path | None = None,
) -> dict[str, Any]:
    """Gives every item a SID, and writes a dataset that has them.

    Args:
      data: a folder with `items.parquet` (`item_id`, `title`), and maybe `histories.parquet`.
      out: gets items.parquet, the histories, codebooks.npz (for `init.codebooks`), quantizer.npz
        and fitted_to.txt (digests of what it was fitted to),
        sids_config.json, and the report: sids.json, sids.png, sids.html. A killed call goes on
        where it was, and what an earlier one fitted to the same vectors there is not fitted again.
      embeddings: the items' vectors, see `read_vectors`; vectors of titles where None.
      overrides: of `SidsConfig`, such as `quantizer.codes=(256,256,256)`.
      say: called with each line of progress.
      earlier: what an earlier call wrote. Its items keep their SIDs, and others get theirs from its
        codebooks; nothing is fitted.

    Returns:
      What the report measured.
    """
    check_local(out)
    config, fitted = SidsConfig(), {}
    if earlier is not None:
        if overrides:
            raise UserError(
                f"--apply {earlier} says how SIDs are made; {overrides[0]} has no place"
            )
        config, fitted = read_config(earlier / CONFIG, SidsConfig), _load(earlier / FITTED)
    for text in overrides:
        config = override(config, text)
    named = read_titles(data)
    beside = out.absolute().parent
    if not beside.is_dir():
        raise UserError(f"{out}: no folder {beside}")
    unfinished = beside / f".{out.name}.fit"
    unpacked = beside / f".{out.name}.vectors.npy"
    try:
        vectors, of_texts = _vectors(config, data / ITEMS, named, embeddings, unpacked, fitted)
        quantizer = config.quantizer
        about, noted = None, out / FITTED_TO
        if earlier is None:
            about = fitted_to(quantizer, vectors)
        if about is not None and noted.is_file() and noted.read_text() == about:
            fitted = _load(out / FITTED)
        elif about is not None:
            say(
                f"{quantizer.name}: {vectors.count:,} vectors of {vectors.width} numbers to "
                f"{quantizer.levels} levels of {quantizer.codes} codes"
            )
            fitted = of_texts | fit_quantizer(quantizer, vectors, unfinished)
        measured = _write(config, data, out, named, vectors, fitted, earlier, about)
    finally:
        unpacked.unlink(missing_ok=True)
    remove_folder(unfinished)
    return measured


def _load(path: Path) -> Fitted:
    try:
        with reading_npz(path) as arrays:
            return dict(arrays)
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise UserError(f"{path}: not what `prefixmem sids` wrote ({error})") from None


def _vectors(
    config: SidsConfig,
    path: Path,
    named: Named,
    embeddings: Path | None,
    unpacked: Path,
    fitted: Fitted,
) -> tuple[Vectors, Fitted]:
    """The items' vectors, and of those of titles what makes more of them."""
    titles, keys = named
    prefix, width = "text_", None
    arrays = {name.removeprefix(prefix): x for name, x in fitted.items() if name.startswith(prefix)}
    by_words = embeddings is None and config.text_model is None
    if embeddings is not None and config.text_model is not None:
        raise UserError("--embeddings and text_model both say what vectors are; expected one")
    if fitted:
        width = config.quantizer.width(fitted)
        if bool(arrays) != by_words:
            made_of = "titles; leave --embeddings out" if arrays else "vectors; name --embeddings"
            raise UserError(f"--apply: these SIDs were made of {made_of}")
    if by_words:
        texts = TextVectors(arrays)
        if not fitted:
            texts = TextVectors.fit(titles, config.text_width, config.quantizer.seed)
        vectors = Vectors(texts(titles), None, f"{path}: titles")
        return vectors, {f"{prefix}{name}": array for name, array in texts.arrays.items()}
    if embeddings is None:
        vectors = embed_titles(config.text_model, titles, unpacked)
    else:
        vectors = read_vectors(embeddings, len(titles), keys, unpacked)
    if width not in (None, vectors.width):
        raise UserError(
            f"{vectors.name}: vectors of {vectors.width} numbers, the codebooks' {width}"
        )
    return vectors, {}


def _write(
    config: SidsConfig,
    data: Path,
    out: Path,
    named: Named,
    vectors: Vectors,
    fitted: Fitted,
    earlier: Path | None,
    about: str | None,
) -> dict[str, Any]:
    """Encodes all items, and writes what there is.

    Args:
      about: `fitted_to`; None where nothing was fitted to these vectors.
    """
    quantizer, mesh = config.quantizer, make_mesh()
    titles, keys = named
    sids = np.empty((vectors.count, quantizer.levels), np.int32)
    with progress_bar(vectors.count, "encoding", "item") as bar:
        for items, piece in vectors.pieces():
            sids[items] = quantizer.encode(fitted, piece, mesh)
            bar.update(len(piece))
    codes, last = quantizer.codes, np.full(len(sids), -1)
    if earlier is not None:
        known = _known(read_catalog(earlier), keys, len(sids))
        fixed = known[:, 0] >= 0
        sids[fixed] = known[fixed, : quantizer.levels]
        last[fixed] = known[fixed, -1]
    if config.collisions == "level":
        sids = add_level(sids, last)
        codes = (*codes, int(sids[:, -1].max()) + 1)
    elif config.collisions == "move":

        def last_distances(items: np.ndarray) -> np.ndarray:
            return quantizer.last_distances(fitted, vectors.take(items), sids[items])

        sids = move_to_free(sids, codes[-1], last_distances, last >= 0)
    catalog = Catalog(sids, titles, SidSpace(codes), keys)
    with replacing_files(out, "SIDs", ITEMS) as folder:
        write_items(folder, catalog)
        interactions = None, None
        if (data / HISTORIES).is_file():
            shutil.copy(data / HISTORIES, folder / HISTORIES)
            split = split_dataset(read_dataset(folder, codebook_sizes=codes), "leave_two_out", 0.1)
            interactions = _interactions(split)
        measured = measure(
            sids,
            codes,
            *interactions,
            vectors,
            lambda some: quantizer.decode(fitted, some[:, : quantizer.levels]),
        )
        codebooks = {name: fitted[name] for name in map(level_name, range(quantizer.levels))}
        if len(codes) > quantizer.levels:  # counts mean nothing, so any directions will do
            rng = np.random.default_rng(quantizer.seed)
            shape = (codes[-1], fitted[level_name(0)].shape[1])
            codebooks[level_name(quantizer.levels)] = rng.normal(size=shape).astype(np.float32)
        write_npz(folder / CODEBOOKS, codebooks)
        write_npz(folder / FITTED, fitted)
        if about is not None:
            write_text(folder / FITTED_TO, about)
        write_text(folder / CONFIG, to_json(config))
        write_report(folder, measured)
    return measured


def report_sids(
    data: Path,
    embeddings: Path | None = None,
    overrides: Sequence[str] = (),
    out: Path | None = None,
) -> dict[str, Any]:
    """Measures the SIDs that a dataset has already.

    Args:
      data: its folder.
      overrides: of `ReportConfig`, such as `data.sid_column=sid_image`.
      embeddings: the items' vectors, see `read_vectors`, for how well prefixes gather neighbours.
      out: gets sids.json, sids.png and sids.html.

    Returns:
      What `measure` returns.
    """
    config = ReportConfig(DataConfig(path=str(data)))
    for text in overrides:
        config = override(config, text)
    prepared = prepare_data(config.data)
    catalog = prepared.catalog
    with tempfile.TemporaryDirectory() as folder:
        vectors = None
        if embeddings is not None:
            unpacked = Path(folder) / "vectors.npy"
            vectors = read_vectors(embeddings, len(catalog), catalog.keys, unpacked)
        sizes = catalog.space.codebook_sizes
        measured = measure(catalog.sids, sizes, *_interactions(prepared.split), vectors)
    if out is not None:
        with replacing_files(out, "SID report", PAGE) as folder:
            write_report(folder, measured)
    return measured


def _interactions(split: Split) -> tuple[np.ndarray, np.ndarray]:
    """Items that training has, one of each interaction, and those that validation wants."""
    return split.items[split.train.indices()], split.validation.targets


def _known(old: Catalog, keys: list[str] | None, items: int) -> np.ndarray:
    """SIDs that items have from before, int [items, levels]; -1 where there are none."""
    known = np.full((items, old.space.levels), -1)
    if (keys is None) != (old.keys is None):
        raise UserError("--apply: items have keys here but not there, or there but not here")
    if keys is None:
        count = min(items, len(old))
        known[:count] = old.sids[:count]
        return known
    for item, key in enumerate(keys):
        if key in old.item_of_key:
            known[item] = old.sids[old.item_of_key[key]]
    return known
