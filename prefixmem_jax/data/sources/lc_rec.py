"""LC-Rec's, LETTER's and MiniOneRec's files: NAME.inter.json, NAME.index.json, NAME.item.json."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from prefixmem_jax.data.sources.source import RawData, RawItems, Source, one_folder, valid_text
from prefixmem_jax.errors import UserError
from prefixmem_jax.files import read_json_object
from prefixmem_jax.text import shortened


@dataclass(frozen=True)
class LCRec(Source):
    """A folder with one dataset; SIDs come along where there is an index."""

    def read(self, paths: Sequence[Path]) -> RawData:
        folder = one_folder(paths, "NAME.inter.json, and maybe NAME.index.json and NAME.item.json")
        files = sorted(folder.glob("*.inter.json"))
        if len(files) != 1:
            raise UserError(f"{folder}: {len(files)} files end in .inter.json, expected one")
        path, name = files[0], files[0].name.removesuffix(".inter.json")
        histories = read_json_object(path)
        users: list[str] = []
        items: list[str] = []
        for user, history in histories.items():
            if not isinstance(history, list) or not history:
                raise UserError(f"{path}: user {shortened(user)}: expected a list of items")
            users += [user] * len(history)
            items += map(str, history)
        if not items:
            raise UserError(f"{path}: no users")
        index, about = folder / f"{name}.index.json", folder / f"{name}.item.json"
        known: dict[str, Any] = {}
        for file in (index, about):
            if file.exists():
                known |= dict.fromkeys(read_json_object(file))
        ids = [*known, *dict.fromkeys(item for item in items if item not in known)]
        sids = _sids(index, ids) if index.exists() else None
        titles = _titles(about, ids) if about.exists() else None
        return RawData(
            _texts(users), _texts(items), None, RawItems(_texts(ids), titles, sids), str(path)
        )


def _texts(values: Sequence[str | None]) -> pa.Array:
    return pa.array([None if x is None else valid_text(x) for x in values], pa.string())


def _sids(path: Path, ids: Sequence[str]) -> pa.Array:
    """Codes of tokens such as `<a_17>`: the number in each."""
    index, sids = read_json_object(path), []
    for item in ids:
        tokens = index.get(item)
        codes = [re.fullmatch(r"<\w+?_(\d+)>", str(token)) for token in tokens or ()]
        if not codes or None in codes:
            raise UserError(
                f"{path}: item {shortened(item)}: expected tokens such as <a_17>, got "
                f"{shortened(repr(tokens))}"
            )
        sids.append([int(code[1]) for code in codes])
    return pa.array(sids, pa.list_(pa.int64()))


def _titles(path: Path, ids: Sequence[str]) -> pa.Array:
    about, titles = read_json_object(path), []
    for item in ids:
        said = about.get(item)
        title = said.get("title") if isinstance(said, dict) else None
        titles.append(title if isinstance(title, str) else None)
    return _texts(titles)
