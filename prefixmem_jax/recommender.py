"""Items to recommend: after one history, with titles and SIDs, or to all users of a file."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from prefixmem_jax.data.history_files import HistoryFile, Piece
from prefixmem_jax.errors import UserError
from prefixmem_jax.files import replacing, sha256_of
from prefixmem_jax.inference.engine import Engine
from prefixmem_jax.parallel.mesh import all_agree
from prefixmem_jax.progress import progress_bar, say
from prefixmem_jax.semantic_ids.catalog import Catalog
from prefixmem_jax.storage import is_remote, make_folder, remove_folder
from prefixmem_jax.text import shortened

# Users whose recommendations are kept in memory, and lost where the call is killed.
PIECE = 4096


class Recommendation(NamedTuple):
    """An item, what its owner calls it, its title and SID, and the log-probability of the SID."""

    item: int
    key: str
    title: str | None
    sid: tuple[int, ...]
    score: float


def recommend(
    engine: Engine,
    history: str | Sequence[int],
    top: int,
    exclude_seen: bool = True,
    beam: int | None = None,
) -> list[Recommendation]:
    """The best next items, best first; items that share a SID follow each other by id.

    Args:
      history: item ids, oldest first, as a sequence or as text `12,55,803`.
      top: how many items; fewer come back where the catalogue has fewer.
      exclude_seen: leave out the history's items.
      beam: width of the search; None means `evaluation.beam` of the config, or `top` where that is
        more. What a search keeps, hence its first items, depends on its width.
    """
    catalog = engine.catalog
    top, beam = _widths(engine, top, beam)
    if isinstance(history, str):
        history = parse_history(history, catalog)
    items = np.asarray(history, np.int64)
    if ((items < 0) | (items >= len(catalog))).any():
        raise UserError(f"history: expected items 0..{len(catalog) - 1}, got {list(history)}")
    codes, scores = engine.search([items], beam, constrained=True, exclude_seen=exclude_seen)
    best = _best_items(catalog, codes[0], scores[0], items if exclude_seen else (), top)
    sids = {item: tuple(map(int, catalog.sids[item])) for item, _ in best}
    return [
        Recommendation(item, catalog.key(item), catalog.titles[item], sids[item], score)
        for item, score in best
    ]


def _widths(engine: Engine, top: int, beam: int | None) -> tuple[int, int]:
    """How many items there can be, and the width of the search for them."""
    if top < 1:
        raise UserError(f"--top: expected 1 or more, got {top}")
    top = min(top, len(engine.catalog))
    if beam is None:
        beam = max(engine.spec.config.evaluation.beam, top)
    if beam < top:
        raise UserError(f"--beam: expected as many as --top, {top}, or more, got {beam}")
    return top, beam


def _best_items(
    catalog: Catalog, codes: np.ndarray, scores: np.ndarray, seen: Sequence[int], top: int
) -> list[tuple[int, float]]:
    """The items of searched SIDs and the SIDs' log-probabilities; those that are seen left out."""
    left_out, best = set(map(int, seen)), []
    found = np.isfinite(scores)
    for group, score in zip(catalog.groups(codes[found]), scores[found], strict=True):
        for item in catalog.items_of_group(group):
            if int(item) not in left_out:
                best.append((int(item), float(score)))
        if len(best) >= top:
            break
    return best[:top]


def parse_history(text: str, catalog: Catalog) -> list[int]:
    """Items from `12,55,803`, or from what their owner calls them; UserError where one is none."""
    history = []
    for piece in map(str.strip, text.split(",")):
        if catalog.keys is not None:
            item = catalog.item_of_key.get(piece)
        else:  # digits alone, and few: int() takes much else, and refuses thousands of digits
            is_number = piece.isascii() and piece.isdigit() and len(piece) < 19
            item = int(piece) if is_number and int(piece) < len(catalog) else None
        if item is None:
            raise UserError(
                f"--history: '{shortened(piece, 30)}' is not an item id; expected "
                + (f"0..{len(catalog) - 1}" if catalog.keys is None else "keys of items.parquet")
            )
        history.append(item)
    return history


def recommend_to_all(
    engine: Engine,
    model: str,
    histories: HistoryFile,
    out: Path,
    top: int,
    exclude_seen: bool = True,
    beam: int | None = None,
) -> int:
    """Recommends to every user of a file, and writes a Parquet file with a row for each.

    Columns: `user_id`, `item_ids` list<int> best first, `keys` where items have some, and `scores`
    list<float>, the log-probabilities of the items' SIDs. What is done lies beside `out` until all
    is: the same call goes on from there. With several processes all of them call alike.

    Args:
      model: what the engine has, so that another model does not go on where this one was killed.
      top, exclude_seen, beam: as `recommend`.

    Returns:
      How many items of the histories the catalogue has not; they were left out.
    """
    catalog, unknown = engine.catalog, 0
    if out.is_dir():
        raise UserError(f"--out {out}: a folder; expected a file")
    if out.exists() and not is_remote(out) and out.samefile(histories.path):
        raise UserError(f"--out {out}: is the file of histories; expected another one")
    if catalog.keys is not None and catalog.keys[0].isdigit() and not histories.has_keys:
        say(f"{histories.path}: integers are items' numbers; their keys would be text")
    top, beam = _widths(engine, top, beam)
    asked = [top, beam, exclude_seen, catalog.sha256, sha256_of(histories.path).hex(), model]
    key = hashlib.sha256(json.dumps(asked).encode()).hexdigest()[:16]
    work = out.with_name(f".{out.name}.{key}")
    first, done = jax.process_index() == 0, []
    with progress_bar(histories.users, "recommending", "user", shown=first) as bar:
        for piece in histories.pieces(PIECE, len(catalog), catalog.keys):
            path = work / f"{len(done):06d}.parquet"
            if not all_agree(path.is_file()):
                table = _recommended(engine, piece, top, exclude_seen, beam)
                if first:
                    make_folder(work)
                    with replacing(path) as beside:
                        pq.write_table(table, beside)
            done.append(path)
            unknown += piece.unknown
            bar.update(len(piece.users))
    if first:
        with replacing(out) as beside, pq.ParquetWriter(beside, _schema(done[0])) as writer:
            for path in done:
                with path.open("rb") as file:
                    writer.write_table(pq.read_table(file))
        remove_folder(work)
    return unknown


def _recommended(engine: Engine, piece: Piece, top: int, exclude_seen: bool, beam: int) -> pa.Table:
    catalog = engine.catalog
    codes, scores = engine.search(
        piece.histories, beam, constrained=True, exclude_seen=exclude_seen
    )
    best = [
        _best_items(catalog, *one, history if exclude_seen else (), top)
        for *one, history in zip(codes, scores, piece.histories, strict=True)
    ]
    columns = {"user_id": piece.users}
    items = [[item for item, _ in one] for one in best]
    columns["item_ids"] = pa.array(items, pa.list_(pa.int32()))
    if catalog.keys is not None:
        names = [[catalog.key(item) for item in one] for one in items]
        columns["keys"] = pa.array(names, pa.list_(pa.string()))
    by_rank = [[score for _, score in one] for one in best]
    columns["scores"] = pa.array(by_rank, pa.list_(pa.float32()))
    return pa.table(columns)


def _schema(path: Path) -> pa.Schema:
    with path.open("rb") as file:
        return pq.read_schema(file)
