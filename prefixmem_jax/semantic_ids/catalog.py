"""The catalogue: items, their SIDs and titles, and the way back from a SID to its items."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import numpy as np

from prefixmem_jax.errors import UserError
from prefixmem_jax.semantic_ids.space import SidSpace
from prefixmem_jax.semantic_ids.trie import Trie
from prefixmem_jax.storage import to_path

MAX_CODES = 1 << 16  # of one level, where nobody states how many there are
STATE_CODES = "; state data.codebook_sizes if there are more"


class Catalog:
    """Items 0..N-1 and the SIDs that name them.

    Several items may share a SID; such a set is a *group*. Groups are numbered in the
    lexicographic order of their SIDs.

    Attributes:
      sids: int32 [items, levels].
      titles: one string or None per item.
      keys: what the items' owner calls them, one string per item, each once; None if by number.
      space: the codebook sizes that the codes lie in.
      trie: of the SIDs; its leaves are the groups.
      group_of_item: int64 [items].
    """

    def __init__(
        self,
        sids: np.ndarray,
        titles: Sequence[str | None],
        space: SidSpace,
        keys: Sequence[str] | None = None,
    ):
        self.sids = np.ascontiguousarray(sids, dtype=np.int32)
        self.titles = titles
        self.keys = keys
        self.space = space
        self.trie = Trie(self.sids, space.codebook_sizes)
        self.group_of_item = self.trie.find(self.sids)
        self._items_by_group = np.argsort(self.group_of_item, kind="stable")
        self._group_starts = np.concatenate([[0], np.cumsum(self.trie.counts)])

    @classmethod
    def read_jsonl(cls, path: str | Path, codebook_sizes: tuple[int, ...] | None = None) -> Catalog:
        """Reads what an exported model has as `items.jsonl`.

        One line an item, in order: {"item": 0, "sid": [3, 1, 4], "title": "..." or null}, and on
        every line or none "key": "...".

        Args:
          codebook_sizes: codes per level; the largest code + 1 of each where None.

        Raises:
          UserError: one line that names the file, the line (from 1) and the cause.
        """
        path = to_path(path)
        if path.is_dir():
            raise UserError(f"{path}: is a folder, expected a file such as items.jsonl")
        sids: list[list[int]] = []
        titles: list[str | None] = []
        keys: list[str] = []
        try:
            with path.open("rb") as file:
                for number, line in enumerate(file, start=1):
                    try:
                        sid, title, key = _parse_line(line, len(sids), codebook_sizes)
                        if sids and len(sid) != len(sids[0]):
                            raise ValueError(f"sid has {len(sid)} codes, line 1 has {len(sids[0])}")
                        if sids and (key is None) == bool(keys):
                            raise ValueError("expected a key on all lines or none")
                    except ValueError as error:
                        raise UserError(f"{path}: line {number}: {error}") from None
                    sids.append(sid)
                    titles.append(title)
                    keys += [] if key is None else [key]
        except OSError as error:
            raise UserError(f"{path}: not readable ({error.strerror})") from None
        if not sids:
            raise UserError(f"{path}: no items")
        array = np.array(sids)
        sizes = codebook_sizes or tuple(int(size) for size in array.max(axis=0) + 1)
        return cls(array, titles, SidSpace(tuple(sizes)), keys or None)

    def __len__(self) -> int:
        return len(self.sids)

    @cached_property
    def item_of_key(self) -> dict[str, int]:
        """Items by what their owner calls them."""
        return {key: item for item, key in enumerate(self.keys or ())}

    def key(self, item: int) -> str:
        """What the items' owner calls an item."""
        return str(item) if self.keys is None else self.keys[item]

    @cached_property
    def sha256(self) -> str:
        """Of codebook sizes and every item's SID: under other SIDs a model names other items."""
        digest = hashlib.sha256(np.asarray(self.space.codebook_sizes, np.int64).tobytes())
        digest.update(self.sids.tobytes())
        return digest.hexdigest()

    @property
    def group_sids(self) -> np.ndarray:
        """Distinct SIDs in lexicographic order, int32 [groups, levels]."""
        return self.trie.sids

    @property
    def group_sizes(self) -> np.ndarray:
        """Number of items per distinct SID, int64 [groups]."""
        return self.trie.counts

    def groups(self, sids: np.ndarray) -> np.ndarray:
        """Numbers of the groups that SIDs [n, levels] name, -1 where no item has one."""
        return self.trie.find(sids)

    def items_of_group(self, group: int) -> np.ndarray:
        """Items that share the group's SID, in ascending order."""
        return self._items_by_group[self._group_starts[group] : self._group_starts[group + 1]]


def _parse_line(
    line: bytes, item: int, codebook_sizes: tuple[int, ...] | None
) -> tuple[list[int], str | None, str | None]:
    """What the line of an item in `items.jsonl` must hold; ValueError says why it does not."""
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError):
        raise ValueError("not a JSON object") from None
    if not isinstance(entry, dict):
        raise ValueError("not a JSON object")
    if type(entry.get("item")) is not int or entry["item"] != item:
        raise ValueError(f"item is {_shown(entry.get('item'))}, expected {item}: 0, 1, 2, ...")
    sid, title = entry.get("sid"), entry.get("title")
    if not isinstance(sid, list) or not sid or any(type(code) is not int for code in sid):
        raise ValueError(f"sid is {_shown(sid)}, expected a list of integers")
    if title is not None and not isinstance(title, str):
        raise ValueError(f"title is {_shown(title)}, expected a string or null")
    if codebook_sizes is not None and len(sid) != len(codebook_sizes):
        raise ValueError(f"sid has {len(sid)} codes, expected {len(codebook_sizes)}")
    for level, code in enumerate(sid, start=1):
        size = MAX_CODES if codebook_sizes is None else codebook_sizes[level - 1]
        if not 0 <= code < size:
            hint = STATE_CODES if codebook_sizes is None else ""
            raise ValueError(f"sid level {level} is {_shown(code)}, expected 0..{size - 1}{hint}")
    key = entry.get("key")
    if key is not None and not isinstance(key, str):
        raise ValueError(f"key is {_shown(key)}, expected a string")
    return sid, title, key


def _shown(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else text[:37] + "..."
