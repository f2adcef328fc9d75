"""Recommendations to all users of a file: those of one after the other, and gone on with after a kill."""

import dataclasses
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import prefixmem
from models import make_run, small_config

from prefixmem_jax import recommender
from prefixmem_jax.config_groups import DecoderConfig, EvaluationConfig
from prefixmem_jax.data.formats.parquet import write_dataset
from prefixmem_jax.data.history_files import HistoryFile
from prefixmem_jax.data.prepare import prepare_data
from prefixmem_jax.errors import UserError
from prefixmem_jax.recommender import recommend, recommend_to_all
from prefixmem_jax.runs.checksums import write_checksums
from prefixmem_jax.runs.run import Run
from prefixmem_jax.semantic_ids.catalog import Catalog

CONFIG = small_config(DecoderConfig(layers=1), 0, evaluation=EvaluationConfig(batch_size=8))
HISTORIES = [[3, 1], [], [7], [2, 2, 5, 9, 11, 4], [8, 100_000, 6], [-1], [0, 1, 2]]


def write(path: Path, histories: list, name: str = "item_ids") -> Path:
    users = [f"user {number}" for number in range(len(histories))]
    pq.write_table(pa.table({"user_id": users, name: histories}), path)
    return path


def known(history: list[int], items: int) -> list[int]:
    return [item for item in history if 0 <= item < items]


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Run:
    """Not to be written to; with keys."""
    folder = tmp_path_factory.mktemp("run")
    dataset = prepare_data(CONFIG.data).dataset
    catalog = dataset.catalog
    keys = [f"key-{item}" for item in range(len(catalog))]
    named = Catalog(catalog.sids, catalog.titles, catalog.space, keys)
    write_dataset(folder / "data", dataclasses.replace(dataset, catalog=named))
    data = dataclasses.replace(CONFIG.data, path=str(folder / "data"))
    return make_run(folder / "run", dataclasses.replace(CONFIG, data=data))


@pytest.fixture(scope="module")
def engine(run):
    return run.engine()


def rows_of(path: Path) -> list[tuple]:
    table = pq.read_table(path)
    assert table.column_names == ["user_id", "item_ids", "keys", "scores"]
    return [tuple(row.values()) for row in table.to_pylist()]


def one_by_one(engine, top: int, exclude_seen: bool = True) -> list[tuple]:
    rows = []
    for number, history in enumerate(HISTORIES):
        best = recommend(engine, known(history, len(engine.catalog)), top, exclude_seen)
        items, keys, scores = zip(*((one.item, one.key, one.score) for one in best), strict=True)
        rows.append((f"user {number}", list(items), list(keys), list(scores)))
    return rows


def assert_same(found: list[tuple], expected: list[tuple]) -> None:
    assert [row[:3] for row in found] == [row[:3] for row in expected]
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(ours[3], theirs[3], rtol=1e-5)


@pytest.mark.parametrize("exclude_seen", [True, False])
def test_every_user_gets_what_recommend_gives(engine, tmp_path, exclude_seen):
    expected = one_by_one(engine, 4, exclude_seen)
    assert expected != one_by_one(engine, 4, not exclude_seen)
    keyed = [[f"key-{item}" for item in history] for history in HISTORIES]
    unsigned = pa.array(
        [[item % 2**32 for item in one] for one in HISTORIES], pa.list_(pa.uint32())
    )
    for name, histories in (("numbers", HISTORIES), ("unsigned", unsigned), ("keys", keyed)):
        path, out = write(tmp_path / f"{name}.parquet", histories), tmp_path / f"{name}.out"
        with HistoryFile(path) as file:
            assert recommend_to_all(engine, "m", file, out, 4, exclude_seen) == 2  # unknown items
        assert_same(rows_of(out), expected)


def test_a_killed_call_goes_on_where_it_was(engine, tmp_path, monkeypatch):
    monkeypatch.setattr(recommender, "PIECE", 3)
    path, out = write(tmp_path / "users.parquet", HISTORIES), tmp_path / "best.parquet"
    searched, search = [], engine.search

    def killed_at_the_third(histories, *arguments, **named):
        searched.append(len(histories))
        if len(searched) == 3:
            raise KeyboardInterrupt
        return search(histories, *arguments, **named)

    monkeypatch.setattr(engine, "search", killed_at_the_third)
    with HistoryFile(path) as file, pytest.raises(KeyboardInterrupt):
        recommend_to_all(engine, "m", file, out, 4)
    assert not out.exists() and searched == [3, 3, 1]
    with HistoryFile(path) as file:
        recommend_to_all(engine, "m", file, out, 4)
    assert searched == [3, 3, 1, 1]
    assert sorted(os.listdir(tmp_path)) == ["best.parquet", "users.parquet"]
    monkeypatch.setattr(engine, "search", search)
    assert_same(rows_of(out), one_by_one(engine, 4))
    with HistoryFile(path) as file:  # others are asked for: nothing is taken from before
        recommend_to_all(engine, "m", file, out, 2)
    assert_same(rows_of(out), one_by_one(engine, 2))


def test_what_a_run_is_changes_with_what_it_recommends(run, tmp_path):
    """Trained anew in the same folder, evaluated otherwise or with other counts it is another."""
    shutil.copytree(run.path, tmp_path / "run")
    before = Run(tmp_path / "run").identity()
    assert Run(tmp_path / "run").identity() == before != run.identity()
    step = Run(tmp_path / "run").step
    (tmp_path / "run" / "checkpoints" / str(step) / "other").write_text("rows")
    write_checksums(tmp_path / "run", step)
    trained = Run(tmp_path / "run").identity()
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    config["evaluation"]["item_share"] = 0.25
    (tmp_path / "run" / "config.json").write_text(json.dumps(config))
    otherwise = Run(tmp_path / "run").identity()
    (tmp_path / "run" / "transitions.npz").write_bytes(b"counts")
    assert len({before, trained, otherwise, Run(tmp_path / "run").identity()}) == 4


def test_lists_may_be_of_one_length(engine, tmp_path):
    found = []
    for name, kind in (("any", pa.list_(pa.int64())), ("one", pa.list_(pa.int64(), 2))):
        path = write(tmp_path / name, pa.array([[3, 1], [2, 9]], kind))
        with HistoryFile(path) as file:
            recommend_to_all(engine, "m", file, tmp_path / f"{name}.out", 4)
        found.append(rows_of(tmp_path / f"{name}.out"))
    assert found[0] == found[1] and len(found[0]) == 2


FAULTS = {
    "no file": (lambda path: path, "No such file"),
    "no Parquet": (lambda path: path.write_text("a,b"), "not a readable Parquet file"),
    "no column": (lambda path: write(path, [[1]], "items"), "no column 'item_ids'"),
    "no rows": (lambda path: write(path, pa.array([], pa.list_(pa.int64()))), "has no rows"),
    "no lists": (lambda path: write(path, [1, 2]), "expected lists of integers or strings"),
    "no integers": (lambda path: write(path, [[0.5]]), "expected lists of integers or strings"),
    "a null": (lambda path: write(path, [[1], None]), "hold a null"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_files_that_are_no_histories(engine, tmp_path, name):
    make, words = FAULTS[name]
    path = tmp_path / "users.parquet"
    make(path)
    with pytest.raises(UserError, match=words) as caught, HistoryFile(path) as file:
        recommend_to_all(engine, "m", file, tmp_path / "out", 4)
    assert str(caught.value).startswith(str(path)) and "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_text_needs_keys(engine, tmp_path):
    path = write(tmp_path / "users.parquet", [["a"]])
    with HistoryFile(path) as file, pytest.raises(UserError, match="the catalogue has no keys"):
        next(file.pieces(10, len(engine.catalog), None))


def test_the_command(run, engine, tmp_path):
    path, out = write(tmp_path / "users.parquet", HISTORIES), tmp_path / "best.parquet"
    done = prefixmem("recommend", run.path, "--histories", path, "--out", out, "--top", "4")
    assert "7 users" in done.stdout and "2 items of the histories" in done.stdout
    assert_same(rows_of(out), one_by_one(engine, 4))
    failed = prefixmem("recommend", run.path, "--histories", path, expect=2)
    assert failed.stderr == "prefixmem: recommend: --histories and --out go together\n"
