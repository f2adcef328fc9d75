"""Faults injected into datasets, catalogues and configs: each is one line that names what is wrong."""

import json
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from prefixmem_jax.config import Config
from prefixmem_jax.config_files import load_config, override
from prefixmem_jax.config_groups import SyntheticConfig
from prefixmem_jax.data.formats.parquet import read_catalog, read_dataset, write_dataset
from prefixmem_jax.data.prepare import data_vocabulary, prepare_data
from prefixmem_jax.data.synthetic import make_synthetic
from prefixmem_jax.errors import UserError
from prefixmem_jax.recommender import parse_history
from prefixmem_jax.semantic_ids.catalog import Catalog
from prefixmem_jax.semantic_ids.space import SidSpace
from prefixmem_jax.text import visible

ITEMS, HISTORIES = "items.parquet", "histories.parquet"


@pytest.fixture(scope="module")
def dataset():
    config = SyntheticConfig(items=60, users=40, codebook_sizes=(8, 8, 8), children=(8, 4, 4))
    return make_synthetic(config)[0]


@pytest.fixture
def folder(tmp_path, dataset):
    write_dataset(tmp_path / "data", dataset)
    return tmp_path / "data"


def refused(function, *arguments) -> str:
    """The one line that a fault is refused with, at once."""
    started = time.monotonic()
    with pytest.raises(UserError) as error:
        function(*arguments)
    assert time.monotonic() - started < 5
    message = visible(str(error.value))
    assert message == str(error.value) and len(message) < 400
    return message


# Configs.


@pytest.mark.parametrize(
    "text, words",
    [
        ("data.text_tokens=-5", "data.text_tokens: expected greater than or equal to 0, got -5"),
        ("data.text_tokens=1e10", "data.text_tokens: expected less than or equal to 4194304"),
        ("data.vocabulary_multiple=10**12", "data.vocabulary_multiple: expected int, got '10**12'"),
        ("data.vocabulary_multiple=1e12", "data.vocabulary_multiple: expected less than"),
        ("data.sequence_length=100000000", "data.sequence_length: expected less than or equal to 1048576, got 100000000"),
        ("data.max_items=1000000", "data.max_items: expected less than or equal to 100000, got 1000000"),
        ("data.batch_size=1000000000", "data.batch_size: expected less than or equal to 1048576, got 1000000000"),
        ("data.codebook_sizes=(256,100000000)", "data.codebook_sizes: expected less than or equal to 16777216, got 100000000"),
        (f"data.codebook_sizes={(2,) * 65}", "data.codebook_sizes: Tuple should have at most 64 items"),
        ("data.synthetic.items=1e12", "data.synthetic.items: expected less than or equal to 10000000"),
        ("data.synthetic.users=1e12", "data.synthetic.users: expected less than or equal to 10000000"),
        ("data.synthetic.max_length=1e12", "data.synthetic.max_length: expected less than or equal to 10000"),
        ("data.synthetic.zipf_exponent=1e300", "data.synthetic.zipf_exponent: expected less than or equal to 10"),
        ("data.path=\udcff", "a value is not UTF-8 text"),
        ("optimizer.beta1=2.0", "optimizer.beta1: expected less than 1, got 2.0"),
        ("optimizer.epsilon=-1", "optimizer.epsilon: expected greater than 0, got -1"),
        ("optimizer.weight_decay=-5", "optimizer.weight_decay: expected greater than or equal to 0, got -5"),
        ("optimizer.warmup_steps=-5", "optimizer.warmup_steps: expected greater than or equal to 0, got -5"),
        ("model.init_std=-1", "model.init_std: expected greater than 0, got -1"),
        ("model.layers=1e9", "model.layers: expected less than or equal to 1000"),
        ("seed=-1", "seed: expected greater than or equal to 0, got -1"),
        ("steps=" + "9" * 5000, "steps: expected int, got '999"),
        ("steps=" + "(" * 5000, "steps: expected int, got '((("),
        ("evaluation.users=-3", "evaluation.users: expected greater than or equal to 0, got -3"),
        ("evaluation.beam=1e9", "evaluation.beam: expected less than or equal to 100000"),
    ],
)  # fmt: skip
def test_values_out_of_range_are_refused(text, words):
    assert words in refused(override, Config("x"), text)


def test_whole_numbers_may_be_written_as_floats():
    config = override(Config("x"), "steps=1e3")
    assert config.steps == 1000 and type(config.steps) is int


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"children": (1, 1, 1, 1)}, "data.synthetic.children=(1, 1, 1, 1): all items would have the same SID"),
        ({"codebook_sizes": (1, 1), "children": (9, 9), "liked_codes": 1}, "all items would have the same SID"),
    ],
)  # fmt: skip
def test_a_tree_of_one_leaf_is_refused(changes, words):
    assert words in refused(SyntheticConfig(**changes).check)


BROKEN_KIND = """
from dataclasses import dataclass
from prefixmem_jax.objectives.objective import Objective

@dataclass(frozen=True)
class Half(Objective):
    pass
"""


@pytest.mark.parametrize(
    "name, content, words",
    [
        ("a.json", b'{"name": "caf\xe9"}', "a.json: not JSON"),
        ("a.json", b'{"name": "x"}\x00', "a.json: not JSON"),
        ("a.py", b"name = 'caf\xe9'\n", "a.py: line 1: SyntaxError"),
        ("a.py", b"x = 1\x00\n", "a.py: "),
        ("a.py", b"open('/nowhere/x')\n", "a.py: line 1: FileNotFoundError"),
        ("a.json", b'{"name": "x", "objective": "half_kind"}', "objective: 'half_kind' does not define abstract_batch, build_model"),
        ("a.json", b'{"name": "x", "objective": "wrong_kind"}', "objective: wrong_kind: SyntaxError"),
    ],
)  # fmt: skip
def test_config_files_that_are_no_text_or_do_not_run_are_refused(
    tmp_path, monkeypatch, name, content, words
):
    (tmp_path / "half_kind.py").write_text(BROKEN_KIND)
    (tmp_path / "wrong_kind.py").write_text("def (\n")
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / name).write_bytes(content)
    assert words in refused(load_config, tmp_path / name)


@pytest.mark.parametrize(
    "name", ["quickstart/baseline", "configs/quickstart/baseline.py", "quickstart/baseline.py"]
)
def test_the_packages_configs_have_names_everywhere(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    assert load_config(name).name == "baseline"
    words = "no such config file; did you mean quickstart/baseline?"
    assert words in refused(load_config, name.replace("line", "lin"))
    own = tmp_path / name  # a file there comes first
    own.parent.mkdir(parents=True)
    if own.suffix:
        own.write_text(
            "from prefixmem_jax.config import Config\ndef get_config(): return Config('own')\n"
        )
        assert load_config(name).name == "own"


@pytest.mark.parametrize("name", ["../setup.py", "", ".", "configs", "/quickstart/baseline"])
def test_no_other_file_is_a_packaged_config(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    assert "no such config file" in refused(load_config, name)


# Datasets.


def rewrite(file, column, array):
    def damage(folder):
        table = pq.read_table(folder / file)
        index = table.column_names.index(column)
        pq.write_table(table.set_column(index, column, array(table[column])), folder / file)

    return damage


def with_bytes(column):
    """The text column with bytes in row 3 that are not UTF-8."""
    values = [text.encode() for text in column.to_pylist()]
    values[3] = b"caf\xe9 \xff"
    binary = pa.array(values, pa.binary())
    return pa.Array.from_buffers(pa.string(), len(binary), binary.buffers())


def with_value(row, value, kind=None):
    def change(column):
        values = column.to_pylist()
        values[row] = values[value] if kind == "copy" else value
        return pa.array(values, column.type if kind in (None, "copy") else kind)

    return change


def cut(file, keep):
    def damage(folder):
        content = (folder / file).read_bytes()
        (folder / file).write_bytes(keep(content))

    return damage


def folder_instead(file):
    def damage(folder):
        (folder / file).unlink()
        (folder / file).mkdir()

    return damage


@pytest.mark.parametrize(
    "damage, words",
    [
        (rewrite(HISTORIES, "user_id", with_value(7, 2, "copy")), "histories.parquet: row 7: user_id 2 is already in row 2; expected one row a user"),
        (rewrite(HISTORIES, "user_id", lambda c: pa.array([5] * len(c))), "histories.parquet: row 1: user_id 5 is already in row 0"),
        (rewrite(HISTORIES, "user_id", with_value(4, None)), "histories.parquet: row 4: user_id is null"),
        (rewrite(HISTORIES, "user_id", with_bytes), "histories.parquet: row 3: user_id is not UTF-8 text"),
        (rewrite(HISTORIES, "user_id", lambda c: pa.array([0.5] * len(c))), "histories.parquet: column 'user_id' is double, expected strings"),
        (rewrite(ITEMS, "title", with_bytes), "items.parquet: row 3: title is not UTF-8 text"),
        (rewrite(ITEMS, "title", lambda c: pa.array([[1]] * len(c))), "items.parquet: column 'title' is list"),
        (rewrite(ITEMS, "sid", with_value(9, [1, 10_000_000, 2], pa.list_(pa.int64()))), "items.parquet: row 9: sid level 2 is 10000000, expected 0..65535; state data.codebook_sizes if there are more"),
        (rewrite(ITEMS, "sid", with_value(9, [1, 2**63, 2], pa.list_(pa.uint64()))), "items.parquet: row 9: sid level 2 is -"),
        (cut(ITEMS, lambda content: content[: len(content) // 2]), "items.parquet: not a readable Parquet file"),
        (cut(HISTORIES, lambda content: content[:-1]), "histories.parquet: not a readable Parquet file"),
        (cut(HISTORIES, lambda content: b""), "histories.parquet: not a readable Parquet file"),
        (cut(ITEMS, lambda content: content[:4] + bytes(600) + content[604:]), "items.parquet: not a readable Parquet file"),
        (folder_instead(ITEMS), "items.parquet: a folder; a dataset needs the files"),
        (folder_instead(HISTORIES), "histories.parquet: a folder; a dataset needs the files"),
    ],
)  # fmt: skip
def test_damaged_datasets_are_refused(folder, damage, words):
    damage(folder)
    before = sorted(folder.iterdir())
    assert words in refused(read_dataset, folder)
    assert sorted(folder.iterdir()) == before


def test_ids_of_users_may_be_whole_numbers_and_texts_of_any_encoding(folder, dataset):
    rewrite(HISTORIES, "user_id", lambda c: pa.array(range(100, 140)))(folder)
    rewrite(ITEMS, "title", lambda c: c.dictionary_encode())(folder)
    read = read_dataset(folder)
    assert list(read.histories.user_ids) == [str(n) for n in range(100, 140)]
    assert list(read.catalog.titles) == list(dataset.catalog.titles)
    rewrite(ITEMS, "title", lambda c: pa.nulls(len(c)))(folder)
    assert set(read_catalog(folder).titles) == {None}


def test_codebooks_of_any_size_can_be_stated(folder):
    rewrite(ITEMS, "sid", with_value(9, [1, 100_000, 2], pa.list_(pa.int64())))(folder)
    read = read_catalog(folder, codebook_sizes=(8, 200_000, 8))
    assert read.sids[9].tolist() == [1, 100_000, 2]


@pytest.mark.parametrize(
    "name", ["$^{x} % \n<b>", "item_id=3", "sid=4", "_hidden", ".dot", "50%41"]
)
def test_a_datasets_folder_may_have_any_name(folder, dataset, name):
    moved = folder.rename(folder.parent / name)
    read = read_dataset(moved)
    assert np.array_equal(read.catalog.sids, dataset.catalog.sids)
    assert read.name == name
    config = override(Config("x"), f"data.path={moved}").data
    assert prepare_data(config).dataset.sha256 == read.sha256
    assert data_vocabulary(config).levels == 3


# Catalogues.

LINES = [{"item": n, "sid": [n, 3], "title": f"title {n}"} for n in range(5)]


def written(path: Path, change) -> Path:
    lines = [json.dumps(line).encode() for line in LINES]
    path.write_bytes(b"\n".join(change(lines)) + b"\n")
    return path


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda lines: [*lines[:2], lines[2] + b"\x00", *lines[3:]], "items.jsonl: line 3: not a JSON object"),
        (lambda lines: [b"\x00" * 100, *lines], "items.jsonl: line 1: not a JSON object"),
        (lambda lines: [lines[0].replace(b"title 0", b"caf\xe9")], "items.jsonl: line 1: not a JSON object"),
        (lambda lines: [*lines[:4], lines[4][:9]], "items.jsonl: line 5: not a JSON object"),
        (lambda lines: [b"[" * 100_000], "items.jsonl: line 1: not a JSON object"),
        (lambda lines: [lines[0].replace(b"[0, 3]", b"[0, 10000000]")], "items.jsonl: line 1: sid level 2 is 10000000, expected 0..65535; state"),
        (lambda lines: [lines[0].replace(b"[0, 3]", b"[0, 1" + b"0" * 400 + b"]")], "items.jsonl: line 1: sid level 2 is 1000"),
        (lambda lines: [], "items.jsonl: line 1: not a JSON object"),
    ],
)  # fmt: skip
def test_damaged_catalogues_are_refused(tmp_path, change, words):
    path = written(tmp_path / "items.jsonl", change)
    assert words in refused(Catalog.read_jsonl, path)
    assert sorted(tmp_path.iterdir()) == [path]


def test_a_catalogue_is_a_file(tmp_path):
    words = "is a folder, expected a file such as items.jsonl"
    assert words in refused(Catalog.read_jsonl, tmp_path)
    assert "not readable (No such file" in refused(Catalog.read_jsonl, tmp_path / "nowhere")


# Histories to go on from.


@pytest.mark.parametrize("text", ["²", "٣", "9" * 5000, "", " ", ",", ",,,", "1,,2", "1e3", "-1", "5", "\x1b[31m"])  # fmt: skip
def test_histories_that_are_none_are_refused(text):
    catalog = Catalog(np.arange(5)[:, None], [None] * 5, SidSpace((5,)))
    message = refused(parse_history, text, catalog)
    assert "is not an item id; expected 0..4" in message and len(message) < 100
