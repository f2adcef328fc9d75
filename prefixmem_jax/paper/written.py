"""The configs of a table's rows as files, for machines that train one run at a time: pods."""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Sequence
from pathlib import Path

from prefixmem_jax.config_files import to_json
from prefixmem_jax.files import write_text
from prefixmem_jax.paper.scales import SCALES
from prefixmem_jax.paper.tables import ROWS, TABLES, config_of
from prefixmem_jax.storage import make_folder


def write_configs(
    scale: str, tables: Sequence[str], out: Path, overrides: Sequence[str] = ()
) -> list[str]:
    """Writes OUT/SCALE/configs/ROW.json for each row of tables, at the baseline's learning rate.

    Args:
      overrides: of the baseline's config, and so of every row's.

    Returns:
      The commands that make the data, unless `data.path` names some, train the rows in their order
      and evaluate them.
    """
    folder, commands = out / scale, []
    base = SCALES[scale].baseline(overrides)
    if base.data.path is None:
        data = SCALES[scale].data
        commands.append(f"prefixmem data generate --out {_quoted(folder / 'data')} {_keys(data)}")
        path = dataclasses.replace(base.data, path=str(folder / "data"))
        base = dataclasses.replace(base, data=path)
    make_folder(folder / "configs")
    rate, runs = base.optimizer.learning_rate, {row: folder / "runs" / row for row in ROWS}
    memory = SCALES[scale].memory_of(len(base.data.codebook_sizes or SCALES[scale].data.children))
    for row in _in_order([row for table in tables for row in TABLES[table]]):
        config = config_of(row, SCALES[scale], base, memory, rate, base.seed, runs)
        path = folder / "configs" / f"{row}.json"
        write_text(path, to_json(config))
        commands.append(f"prefixmem train {_quoted(path)} --out {_quoted(runs[row])}")
    compared = dict.fromkeys(row for table in tables for row in TABLES[table])
    commands.append(f"prefixmem evaluate {' '.join(_quoted(runs[row]) for row in compared)}")
    return commands


def _in_order(rows: Sequence[str]) -> list[str]:
    """Rows, each once, after those that it takes its memory from."""
    found: dict[str, None] = {}
    for row in rows:
        found |= dict.fromkeys([*_in_order(ROWS[row].after), row])
    return list(found)


def _keys(config: object) -> str:
    """What of a config is not as it is by default, as overrides."""
    default = type(config)()
    changed = {k: v for k, v in vars(config).items() if v != getattr(default, k)}
    return " ".join(shlex.quote(f"{k}={v}".replace(" ", "")) for k, v in changed.items())


def _quoted(path: Path) -> str:
    return shlex.quote(str(path))
