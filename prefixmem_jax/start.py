"""From raw files to recommendations by own ids: converted, given SIDs, trained, evaluated."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path

import numpy as np

from prefixmem_jax.config_files import override
from prefixmem_jax.data.conversion import ConversionConfig, convert
from prefixmem_jax.data.formats.parquet import read_dataset
from prefixmem_jax.errors import UserError
from prefixmem_jax.evaluation.report import Results
from prefixmem_jax.quickstart import quickstart
from prefixmem_jax.recommender import recommend
from prefixmem_jax.runs.run import Run
from prefixmem_jax.semantic_ids.report import describe
from prefixmem_jax.sids import SidsConfig, make_sids
from prefixmem_jax.text import shortened

# Users who are shown what they are recommended, how much of their history, and how many items.
SHOWN_USERS, SHOWN_HISTORY, SHOWN_ITEMS = 3, 3, 5


def start(
    paths: Sequence[Path],
    out: Path,
    embeddings: Path | None,
    overrides: Sequence[str] = (),
    say: Callable[[str], None] = lambda text: None,
) -> Results:
    """All steps, one after the other; called again it goes on where it was.

    Args:
      paths: what `data.conversion.convert` reads.
      out: gets `raw/` (the converted data), `data/` (with SIDs), and what `quickstart` writes.
      embeddings: the items' vectors, by their own ids; vectors of the titles where None.
      overrides: keys of `ConversionConfig`, of `SidsConfig`, and of the runs.
      say: called with each line of progress.
    """
    conversion = ConversionConfig()
    about_sids, about_runs = [], []
    for text in overrides:
        key = text.partition("=")[0].partition(".")[0]
        if key in ("source", "k_core"):
            conversion = override(conversion, text)
        elif key in {one.name for one in fields(SidsConfig)}:
            about_sids.append(text)
        else:
            about_runs.append(text)
    raw, data = out / "raw", out / "data"
    converted = convert(conversion, paths, raw)
    say(converted.describe())
    if converted.has_sids and embeddings is None:
        if about_sids:
            raise UserError(f"{about_sids[0]}: these items have SIDs; none are made")
        data = raw
    else:
        codes = f"quantizer.codes={codes_for(converted.items)}"
        say(describe(make_sids(raw, data, embeddings, [codes, *about_sids], say)) + "\n")
    results = quickstart(out, str(data), about_runs, say)
    _show(out, data, say)
    return results


def codes_for(items: int) -> tuple[int, ...]:
    """Codes by level for a catalogue of this size: 4 levels of 256, fewer for few items."""
    codes = 256
    while codes > 4 and codes * 8 > items:
        codes //= 2
    return (codes,) * 4


def _show(out: Path, data: Path, say: Callable[[str], None]) -> None:
    """What some users are recommended after all that they did."""
    dataset = read_dataset(data)
    catalog, histories = dataset.catalog, dataset.histories
    run = Run(out / "prefixmem")
    engine = run.engine(run.catalog(None))
    rng = np.random.default_rng(0)
    for user in rng.choice(len(histories), min(SHOWN_USERS, len(histories)), replace=False):
        history = histories.of(user)
        last = ", ".join(
            _named(catalog.key(i), catalog.titles[i]) for i in history[-SHOWN_HISTORY:]
        )
        say(f"\nuser {histories.user_ids[user]}, {len(history)} items, the last: {last}")
        for one in recommend(engine, history, SHOWN_ITEMS):
            say(f"  {one.score:8.3f}  {_named(one.key, one.title)}")


def _named(key: str, title: str | None) -> str:
    return shortened(f"{key} ({title})" if title else key, 60)
