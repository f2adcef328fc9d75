"""Items to recommend after a history, with their titles and SIDs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from prefixmem_jax.errors import UserError
from prefixmem_jax.inference.engine import Engine
from prefixmem_jax.semantic_ids.catalog import Catalog
from prefixmem_jax.text import shortened


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
    if top < 1:
        raise UserError(f"--top: expected 1 or more, got {top}")
    top = min(top, len(catalog))
    if beam is None:
        beam = max(engine.spec.config.evaluation.beam, top)
    if beam < top:
        raise UserError(f"--beam: expected as many as --top, {top}, or more, got {beam}")
    if isinstance(history, str):
        history = parse_history(history, catalog)
    items = np.asarray(history, np.int64)
    if ((items < 0) | (items >= len(catalog))).any():
        raise UserError(f"history: expected items 0..{len(catalog) - 1}, got {list(history)}")
    codes, scores = engine.search([items], beam, constrained=True, exclude_seen=exclude_seen)
    best = []
    for sid, score in zip(codes[0], scores[0], strict=True):
        if np.isfinite(score):
            for item in catalog.items_of_group(catalog.groups(sid[None])[0]):
                if not (exclude_seen and item in items):
                    title, codes_of_item = catalog.titles[item], tuple(map(int, sid))
                    best.append(
                        Recommendation(
                            int(item), catalog.key(item), title, codes_of_item, float(score)
                        )
                    )
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
