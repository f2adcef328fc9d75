"""A table of interactions, and maybe one of items: CSV, TSV, JSON lines or Parquet."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from prefixmem_jax.data.sources.source import (
    RawData,
    RawItems,
    Source,
    column,
    ids_of,
    read_table,
    texts_of,
    times_of,
)
from prefixmem_jax.errors import UserError

USER = ("user_id", "user", "userId", "reviewerID", "uid", "session_id", "visitorid")
ITEM = ("item_id", "item", "itemId", "movieId", "product_id", "parent_asin", "asin", "iid")
# In a table of interactions that would be the number of one.
OWN_ID = (*ITEM, "id")
TIME = ("timestamp", "time", "ts", "datetime", "date", "unixReviewTime", "event_time")
TITLE = ("title", "name", "item_name", "product_name", "text")


@dataclass(frozen=True)
class Tables(Source):
    """One row for each interaction; one for each item.

    Attributes:
      user, item, time: columns of the interactions; None: the first of the usual names that is
        there. Without a time, interactions stand in their order.
      item_id, title: columns of the items, alike.
    """

    user: str | None = None
    item: str | None = None
    time: str | None = None
    item_id: str | None = None
    title: str | None = None

    def read(self, paths: Sequence[Path]) -> RawData:
        """
        Args:
          paths: of the items and of the interactions, or of the interactions alone.
        """
        if len(paths) not in (1, 2):
            raise UserError("expected ITEMS INTERACTIONS, or INTERACTIONS alone")
        catalogue = self._items(paths[0]) if len(paths) == 2 else None
        path = paths[-1]
        ids = (self.user, self.item, *USER, *ITEM)
        table = read_table(path, ids=ids, wanted=(*ids, self.time, *TIME))
        user = column(path, table, "source.user", self.user, USER)
        item = column(path, table, "source.item", self.item, ITEM)
        times = None
        if self.time is not None or set(TIME) & set(table.column_names):
            time = column(path, table, "source.time", self.time, TIME)
            times = times_of(path, table, time)
        return RawData(
            ids_of(path, table, user), ids_of(path, table, item), times, catalogue, str(path)
        )

    def _items(self, path: Path) -> RawItems:
        names = (self.item_id, *OWN_ID)
        table = read_table(path, ids=names, wanted=(*names, self.title, *TITLE))
        ids = ids_of(path, table, column(path, table, "source.item_id", self.item_id, OWN_ID))
        titles = None
        if self.title is not None or set(TITLE) & set(table.column_names):
            titles = texts_of(path, table, column(path, table, "source.title", self.title, TITLE))
        return RawItems(ids, titles)
