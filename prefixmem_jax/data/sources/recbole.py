"""RecBole's atomic files: NAME.inter, and maybe NAME.item, with typed headers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa

from prefixmem_jax.data.sources.source import (
    RawData,
    RawItems,
    Source,
    column,
    ids_of,
    one_folder,
    read_table,
    texts_of,
    times_of,
)
from prefixmem_jax.data.sources.tables import TITLE
from prefixmem_jax.errors import UserError


@dataclass(frozen=True)
class RecBole(Source):
    """A folder with one dataset.

    Attributes:
      title: column of NAME.item; None: the first of the usual names that is there.
    """

    title: str | None = None

    def read(self, paths: Sequence[Path]) -> RawData:
        folder = one_folder(paths, "NAME.inter and maybe NAME.item")
        files = sorted(folder.glob("*.inter"))
        if len(files) != 1:
            raise UserError(f"{folder}: {len(files)} files end in .inter, expected one")
        path = files[0]
        table = _untyped(path)
        times = None
        if "timestamp" in table.column_names:
            times = times_of(path, table, "timestamp")
        catalogue, about = None, path.with_suffix(".item")
        if about.exists():
            items = _untyped(about)
            ids = ids_of(about, items, column(about, items, "item_id", "item_id", ()))
            titles = None
            if self.title is not None or set(TITLE) & set(items.column_names):
                titles = texts_of(
                    about, items, column(about, items, "source.title", self.title, TITLE)
                )
            catalogue = RawItems(ids, titles)
        user = column(path, table, "user_id", "user_id", ())
        item = column(path, table, "item_id", "item_id", ())
        return RawData(
            ids_of(path, table, user), ids_of(path, table, item), times, catalogue, str(path)
        )


def _untyped(path: Path) -> pa.Table:
    """A file's columns, named without their types: `user_id:token` is `user_id`, and text."""
    table = read_table(path, separator="\t", ids=("user_id:token", "item_id:token"))
    return table.rename_columns([name.partition(":")[0] for name in table.column_names])
