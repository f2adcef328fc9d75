"""Datasets: what is refused and how, documents, packing, the pipeline, the synthetic process."""

import collections
import dataclasses
import itertools
import re
import shutil

import grain
import jax
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import real_data
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from test_splits import spelled

from prefixmem_jax.config import Config
from prefixmem_jax.config_files import load_config
from prefixmem_jax.config_groups import DataConfig, SyntheticConfig
from prefixmem_jax.data.batch import Batch, batches
from prefixmem_jax.data.documents.document import Corpus, Documents, mixture
from prefixmem_jax.data.documents.items import (
    Items,
    document_length,
    example_documents,
    prompt_documents,
)
from prefixmem_jax.data.formats.parquet import read_catalog, read_dataset, write_dataset
from prefixmem_jax.data.packing import one_per_row, pack
from prefixmem_jax.data.pipeline import (
    RowsInMemory,
    global_batch,
    rows_of_batch,
    training_batches,
)
from prefixmem_jax.data.prepare import data_vocabulary, fixed_sample, load_catalog, prepare_data
from prefixmem_jax.data.synthetic import make_synthetic
from prefixmem_jax.errors import UserError
from prefixmem_jax.inspection import inspect
from prefixmem_jax.semantic_ids.space import SidSpace

SMALL = SyntheticConfig(items=200, users=150, codebook_sizes=(8, 8, 8), children=(8, 4, 4))


@pytest.fixture
def folder(tmp_path):
    dataset, _ = make_synthetic(SMALL)
    times = np.sort(np.random.default_rng(0).integers(0, 1000, len(dataset.histories.items)))
    histories = dataclasses.replace(dataset.histories, timestamps=times)
    write_dataset(tmp_path / "good", dataclasses.replace(dataset, histories=histories))
    return tmp_path / "good"


@pytest.fixture(scope="module")
def small():
    return prepare_data(DataConfig(synthetic=SMALL, text_tokens=5))


def test_written_datasets_read_the_same_in_any_order_of_the_items(folder):
    dataset, _ = make_synthetic(SMALL)
    written = read_dataset(folder, codebook_sizes=(8, 8, 8))
    assert written.catalog.space == dataset.catalog.space
    assert np.array_equal(written.histories.items, dataset.histories.items)
    assert np.array_equal(written.histories.offsets, dataset.histories.offsets)
    table = pq.read_table(folder / "items.parquet")
    pq.write_table(table.take(np.random.default_rng(0).permutation(200)), folder / "items.parquet")
    shuffled = read_dataset(folder)
    assert shuffled.sha256 != written.sha256
    for catalog in (written.catalog, shuffled.catalog, read_catalog(folder)):
        assert np.array_equal(catalog.sids, dataset.catalog.sids)
        assert list(catalog.titles) == list(dataset.catalog.titles)


def change(file, column, row, value):
    def damage(folder):
        path = folder / file
        table = pq.read_table(path)
        values = table[column].to_pylist()
        values[row] = value(values[row]) if callable(value) else value
        index = table.column_names.index(column)
        array = pa.array(values, table[column].type)
        pq.write_table(table.set_column(index, column, array), path)

    return damage


def drop(file, column):
    def damage(folder):
        pq.write_table(pq.read_table(folder / file).drop_columns([column]), folder / file)

    return damage


@pytest.mark.parametrize(
    "damage, words",
    [
        (change("histories.parquet", "item_ids", 3, [1, 999]), "histories.parquet: row 3: unknown item 999; items.parquet has 0..199"),
        (change("histories.parquet", "item_ids", 5, [-1]), "histories.parquet: row 5: unknown item -1"),
        (change("histories.parquet", "item_ids", 7, []), "histories.parquet: row 7: item_ids is empty"),
        (change("histories.parquet", "item_ids", 7, [1, None]), "histories.parquet: row 7: item_ids holds a null"),
        (change("histories.parquet", "item_ids", 4, None), "histories.parquet: row 4: item_ids is null"),
        (change("histories.parquet", "timestamps", 2, [1]), "histories.parquet: row 2: 1 timestamps for"),
        (change("histories.parquet", "timestamps", 0, lambda times: list(range(len(times), 0, -1))), "histories.parquet: row 0: timestamps go backwards"),
        (change("items.parquet", "sid", 9, [1, 2]), "items.parquet: row 9: sid has 2 codes, row 0 has 3"),
        (change("items.parquet", "sid", 9, [1, -2, 3]), "items.parquet: row 9: sid level 2 is -2, expected 0.."),
        (change("items.parquet", "sid", 9, [1, 8, 3]), "items.parquet: row 9: sid level 2 is 8, expected 0..7"),
        (change("items.parquet", "item_id", 6, 5), "items.parquet: row 6: item_id 5 is already in row 5"),
        (change("items.parquet", "item_id", 6, 400), "items.parquet: row 6: item_id 400 is outside 0..199"),
        (drop("items.parquet", "sid"), "items.parquet: no column 'sid'"),
        (drop("histories.parquet", "user_id"), "histories.parquet: no column 'user_id'"),
        (lambda folder: (folder / "items.parquet").unlink(), "items.parquet: no such file"),
        (lambda folder: (folder / "histories.parquet").write_text("a,b\n1,2\n"), "histories.parquet: not a readable Parquet file"),
        (lambda folder: shutil.rmtree(folder), "not a folder with items.parquet"),
    ],
)  # fmt: skip
def test_bad_data_is_refused_in_one_line(folder, damage, words):
    damage(folder)
    with pytest.raises(UserError) as error:
        read_dataset(folder, codebook_sizes=(8, 8, 8))
    assert words in str(error.value)
    assert "\n" not in str(error.value)


TOY_FORMAT = """
import hashlib
from pathlib import Path

import numpy as np

from prefixmem_jax.data.dataset import Dataset, Histories
from prefixmem_jax.semantic_ids.catalog import Catalog


def read_catalog(folder, sid_column, codebook_sizes):
    return Catalog.read_jsonl(Path(folder) / "items.jsonl", codebook_sizes)


def read_dataset(folder, sid_column, codebook_sizes):
    text = (Path(folder) / "histories.txt").read_text()
    users = [[int(item) for item in line.split()] for line in text.splitlines()]
    offsets = np.cumsum([0] + [len(user) for user in users])
    histories = Histories(np.concatenate(users), offsets, [str(n) for n in range(len(users))])
    digest = hashlib.sha256(text.encode()).hexdigest()
    return Dataset("toy", read_catalog(folder, sid_column, codebook_sizes), histories, digest)
"""


def test_a_format_is_a_module_anywhere(tmp_path, monkeypatch):
    (tmp_path / "toy_format.py").write_text(TOY_FORMAT)
    (tmp_path / "half_format.py").write_text("def read_dataset(*arguments): ...\n")
    stubborn = TOY_FORMAT.replace('"items.jsonl", codebook_sizes)', '"items.jsonl")')
    (tmp_path / "stubborn_format.py").write_text(stubborn)
    monkeypatch.syspath_prepend(tmp_path)
    data = tmp_path / "data"
    data.mkdir()
    lines = [f'{{"item": {n}, "sid": [{n % 3}, {n}], "title": null}}\n' for n in range(6)]
    (data / "items.jsonl").write_text("".join(lines))
    config = DataConfig(path=str(data), format="toy_format", text_tokens=10, vocabulary_multiple=8)
    # Without its histories a dataset still has a catalogue and a vocabulary.
    assert len(load_catalog(config)) == 6
    vocabulary = data_vocabulary(config)
    assert vocabulary.space.codebook_sizes == (3, 6) and vocabulary.size == 24
    (data / "histories.txt").write_text("0 1 2 3\n4 5 0\n")
    prepared = prepare_data(config)
    assert prepared.vocabulary == vocabulary and prepared.process is None
    assert prepared.split.test.targets.tolist() == [3, 0]
    assert prepared.item_counts.tolist() == [1, 1, 0, 0, 1, 0]
    assert prepared.item_tokens[4].tolist() == [10 + 2 + 1, 10 + 2 + 3 + 4]

    def refused(**changes):
        with pytest.raises(UserError) as error:
            prepare_data(dataclasses.replace(config, **changes))
        assert "\n" not in str(error.value)
        return str(error.value)

    assert "half_format has no function read_catalog" in refused(format="half_format")
    assert "data.format" in refused(format="parket") and "parquet" in refused(format="parket")
    words = "read codebooks of (3, 6), data.codebook_sizes=(4, 9)"
    assert words in refused(format="stubborn_format", codebook_sizes=(4, 9))
    assert "data.path is none" in refused(path=None, codebook_sizes=(4, 9))


def test_stated_codebooks_need_no_data_at_all():
    for path in ("nowhere", None):
        vocabulary = data_vocabulary(DataConfig(path=path, codebook_sizes=(4, 9), text_tokens=3))
        assert vocabulary.space == SidSpace((4, 9)) and vocabulary.text_tokens == 3


def test_a_sample_is_fixed():
    assert fixed_sample(10, 4).tolist() == [2, 4, 5, 7]
    assert fixed_sample(10, 0).tolist() == fixed_sample(10, 11).tolist() == list(range(10))


def packed(data, length, max_items, seed=0):
    options = DataConfig(max_items=max_items, sequence_length=length)
    documents = mixture([Items()], Corpus(data, options), seed)
    return pack(documents, length, seed)


def test_packing_keeps_every_item_once_and_documents_apart(small):
    batch = packed(small, 40, 6)
    read = []
    for tokens, segments, positions, mask, next_item in zip(*batch, strict=True):
        for segment in range(1, segments.max() + 1):
            at = np.flatnonzero(segments == segment)
            assert np.array_equal(at, np.arange(at[0], at[-1] + 1))
            assert np.array_equal(positions[at], np.arange(len(at)))
            assert tokens[at[0]] == small.vocabulary.bos_token
            assert mask[at].tolist() == [1] * (len(at) - 1) + [0]
            sids = small.vocabulary.decode(tokens[at[1:]].reshape(-1, 3))
            read.append(sids)
            before_items = next_item[at[:-1:3]] - 1
            assert np.array_equal(small.catalog.sids[before_items], sids)
            assert (next_item[at] > 0).sum() == len(sids)
        for array in (tokens, mask, next_item):
            assert not array[segments == 0].any()
    expected = []
    for start, stop in zip(small.split.train.starts, small.split.train.stops, strict=True):
        for end in range(stop, start, -6):
            expected.append(small.catalog.sids[small.split.items[max(start, end - 6) : end]])
    assert sorted(d.tobytes() for d in read) == sorted(e.tobytes() for e in expected)
    same, other = packed(small, 40, 6), packed(small, 40, 6, seed=1)
    assert all(map(np.array_equal, same, batch))
    assert not np.array_equal(other.tokens, batch.tokens)
    with pytest.raises(UserError, match="sequence_length=3 is too short: one item needs 4 tokens"):
        packed(small, 3, 6)


def numbered(lengths) -> Documents:
    """Documents of these lengths; token n is token n of all."""
    offsets = np.cumsum([0, *lengths])
    tokens = np.arange(offsets[-1], dtype=np.int32)
    return Documents(tokens, np.ones(len(tokens), np.float32), tokens + 1, offsets)


def documents_of_rows(batch: Batch) -> list[list[tuple[int, ...]]]:
    """Tokens of each document of each row; segments are numbered from 1, padding comes last."""
    found = []
    for tokens, segments, positions in zip(
        batch.tokens, batch.segment_ids, batch.positions, strict=True
    ):
        count = segments.max(initial=0)
        places = [np.flatnonzero(segments == number + 1) for number in range(count)]
        used = np.concatenate([*places, np.zeros(0, int)])
        assert np.array_equal(used, np.arange(len(used))) and len(used) == (segments > 0).sum()
        assert all(np.array_equal(positions[at], np.arange(len(at))) for at in places)
        found.append([tuple(tokens[at].tolist()) for at in places])
    return found


def fullest_row(lengths: list[int], room: int, most: int | None) -> int:
    """The most tokens that whole documents, the longest among them, have in one row."""
    longest, *rest = sorted(lengths, reverse=True)
    found = {(1, longest)}
    for length in rest:
        found |= {(count + 1, total + length) for count, total in found}
        found = {(c, total) for c, total in found if total <= room and c <= (most or c)}
    return max(total for _, total in found)


@settings(max_examples=100, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 12), max_size=40),
    most=st.none() | st.integers(1, 5),
    seed=st.integers(0, 3),
)
def test_packing_loses_nothing_and_fills_each_row_as_full_as_it_can_be(lengths, most, seed):
    """From the longest documents on, of what is left: rows with less in them came later."""
    documents = numbered(lengths)
    batch = pack(documents, 12, seed, most)
    rows = documents_of_rows(batch)
    whole = np.split(documents.tokens, documents.offsets[1:-1]) if lengths else []
    assert sorted(itertools.chain(*rows)) == sorted(tuple(tokens.tolist()) for tokens in whole)
    there = batch.segment_ids > 0
    assert np.array_equal(batch.next_item[there], batch.tokens[there] + 1)
    assert np.array_equal(batch.loss_mask, there)
    left = collections.Counter(lengths)
    for row in sorted([[*map(len, row)] for row in rows], key=lambda row: (-max(row), -sum(row))):
        assert sum(row) == fullest_row([*left.elements()], 12, most) and len(row) <= (most or 12)
        assert max(row) == max(left.elements())
        left -= collections.Counter(row)
    assert not left
    assert all(map(np.array_equal, pack(documents, 12, seed, most), batch))
    if lengths:
        with pytest.raises(UserError, match=f"a document has {max(lengths)}"):
            pack(documents, max(lengths) - 1, seed)


def test_packing_wastes_next_to_nothing_among_many_lengths():
    """More lengths than are tried at a time."""
    lengths = 1 + np.random.default_rng(0).geometric(0.02, 30_000) % 400
    batch = pack(numbered(lengths), 512, 0)
    assert (batch.segment_ids > 0).sum() == lengths.sum()
    assert lengths.sum() / 512 <= len(batch.tokens) < 1.0003 * lengths.sum() / 512 + 1


@pytest.mark.parametrize(
    "name, config, allowed",
    [("beauty", "recommend/small", 0.01), ("microlens", "recommend/small", 0.003)],
)
def test_packing_wastes_little_of_real_rows(name, config, allowed):
    """Documents of 4 codes an item and one token, few of which fill a row together."""
    config = load_config(config, [f"data.path={real_data(name)}"])
    data = prepare_data(config.data)
    rows = config.objective.training_rows(Corpus(data, config.data), config.seed)
    assert (rows.segment_ids == 0).mean() < allowed


def test_items_that_share_a_sid_move_to_free_ones(tmp_path):
    """Three items of a prefix that has two codes left, five of one that has none."""
    sids = [[0, 0], [0, 3], [0, 3], [1, 1], [0, 3], [1, 1], [1, 0], [1, 2], [1, 3], [2, 2]]
    pq.write_table(pa.table({"item_id": range(10), "sid": sids}), tmp_path / "items.parquet")
    users = {"user_id": ["a", "b"], "item_ids": [[0, 1, 2, 3], [4, 5, 6, 7, 8, 9]]}
    pq.write_table(pa.table(users), tmp_path / "histories.parquet")
    keep = DataConfig(path=str(tmp_path))
    move = dataclasses.replace(keep, shared_sids="move")
    assert load_catalog(keep).sids.tolist() == sids
    moved = load_catalog(move)
    # 3 is taken, 0 too: 1 comes next. Under code 1 all are taken.
    expected = [[0, 0], [0, 3], [0, 1], [1, 1], [0, 2], [1, 1], [1, 0], [1, 2], [1, 3], [2, 2]]
    assert moved.sids.tolist() == expected
    data = prepare_data(move)
    assert data.catalog.sids.tolist() == expected
    assert data.vocabulary.sids.tolist() == expected
    assert data.vocabulary.space == prepare_data(keep).vocabulary.space


def test_items_as_sids_of_one_code(tmp_path):
    """From a file and of the synthetic dataset; `plan` counts the same tokens without either."""
    options = DataConfig(
        sid_column="item_id",
        synthetic=SyntheticConfig(items=50, users=30, codebook_sizes=(4, 5), children=(4, 5)),
    )
    made = prepare_data(options)
    write_dataset(tmp_path, prepare_data(dataclasses.replace(options, sid_column="sid")).dataset)
    read = prepare_data(dataclasses.replace(options, path=str(tmp_path)))
    for data in (made, read):
        np.testing.assert_array_equal(data.catalog.sids, np.arange(50)[:, None])
        assert data.vocabulary.space.codebook_sizes == (50,) and data.vocabulary.items == 50
        np.testing.assert_array_equal(data.split.test.targets, made.split.test.targets)
    assert data_vocabulary(options) == made.vocabulary


def test_examples_predict_only_the_target_and_prompts_stop_before_it(small):
    examples, vocabulary = small.split.test.take(slice(7)), small.vocabulary
    whole = one_per_row(
        example_documents(examples, small.item_tokens, vocabulary, 5), document_length(3, 6)
    )
    histories = [*examples.histories(), []]
    prompts = one_per_row(
        prompt_documents(histories, small.item_tokens, vocabulary, 5), document_length(3, 5)
    )
    last = (prompts.segment_ids > 0).sum(axis=1) - 1  # what comes after it is asked for
    assert np.array_equal(prompts.loss_mask, np.arange(16) == last[:, None])
    assert prompts.tokens[7].tolist() == [vocabulary.bos_token] + [0] * 15
    assert prompts.segment_ids[7].tolist() == [1] + [0] * 15
    for row, (_, history, target) in enumerate(spelled(examples)):
        predicted = np.flatnonzero(whole.loss_mask[row]) + 1
        assert np.array_equal(whole.tokens[row, predicted], small.item_tokens[target])
        length = (prompts.segment_ids[row] > 0).sum()
        assert length == 1 + 3 * min(5, len(history)) == predicted[0]
        assert np.array_equal(prompts.tokens[row, :length], whole.tokens[row, :length])
        assert vocabulary.decode(prompts.tokens[row, 1:length].reshape(-1, 3)).tolist() == (
            small.catalog.sids[history[-5:]].tolist()
        )
    pieces = batches(whole, 4)
    assert [piece.tokens.shape for piece in pieces] == [(4, 19)] * 2
    assert not any(array[3].any() for array in pieces[1])


def test_pipeline_reshuffles_each_epoch_and_resumes_anywhere():
    rows = Batch.zeros(10, 3)
    rows.tokens[:] = np.arange(10)[:, None]

    def draw(iterator: grain.DatasetIterator, count: int):
        return [next(iterator).tokens[:, 0].tolist() for _ in range(count)]

    whole = draw(training_batches(RowsInMemory(rows), 2, seed=0), 12)
    assert all(sorted(np.concatenate(whole[i : i + 5])) == list(range(10)) for i in (0, 5))
    assert whole[:5] != whole[5:10]
    assert [rows_of_batch(step, 10, 2, seed=0) for step in range(1, 13)] == whole
    iterator = training_batches(RowsInMemory(rows), 2, seed=0)
    draw(iterator, 7)
    resumed = training_batches(RowsInMemory(rows), 2, seed=0)
    resumed.set_state(iterator.get_state())
    assert draw(resumed, 5) == whole[7:]
    with pytest.raises(UserError, match="only 10 rows"):
        training_batches(RowsInMemory(rows), 11, seed=0)


def test_batches_stay_batches_on_their_way_to_the_devices():
    local = next(training_batches(RowsInMemory(Batch.zeros(10, 3)), 8, seed=0))
    assert isinstance(local, Batch)
    sharding = NamedSharding(jax.make_mesh((8,), ("data",)), P("data"))
    everywhere = global_batch(local, sharding)
    abstract = Batch.abstract(8, 3, sharding)
    assert isinstance(everywhere, Batch)
    for array, expected in zip(everywhere, abstract, strict=True):
        assert (array.shape, array.dtype) == (expected.shape, expected.dtype)
        assert array.sharding == sharding


def test_the_synthetic_dataset_is_always_the_same():
    dataset, _ = make_synthetic(SMALL)
    assert dataset.sha256[:16] == "b7f05ab19c67dfdc"
    catalog = load_catalog(DataConfig(synthetic=SMALL))
    assert catalog.trie.checksum == dataset.catalog.trie.checksum


def test_the_synthetic_optimum_is_the_true_distribution():
    """The stated next-item probabilities match what the process draws, and sum to one."""
    config = dataclasses.replace(SMALL, items=30, users=40_000, groups=3, max_length=4)
    dataset, process = make_synthetic(config)
    seconds: dict[int, list[int]] = {}
    for user in range(len(dataset.histories)):
        items = dataset.histories.of(user)
        seconds.setdefault(int(items[0]), []).append(int(items[1]))
    first = max(seconds, key=lambda item: len(seconds[item]))
    expected = process.next_item_distribution([first])
    assert abs(expected.sum() - 1) < 1e-9
    drawn = np.bincount(seconds[first], minlength=30) / len(seconds[first])
    deviation = np.sqrt(expected * (1 - expected) / len(seconds[first]))
    assert (np.abs(drawn - expected) < 5 * deviation + 1e-9).all()
    # The history tells the taste group: the same last item, other earlier ones, other odds.
    liked = np.argmax(process.base, axis=1)
    one, other = (process.next_item_distribution([liked[g]] * 3 + [first]) for g in (0, 1))
    assert np.abs(one - other).max() > 0.01


@pytest.mark.parametrize(
    "name, items, users, sizes",
    [
        ("beauty", 12101, 22363, (256, 256, 256, 256)),
        ("microlens", 5312, 13210, None),
        ("amazon180k", 180808, 39283, (256, 256, 256, 256)),
    ],
)
def test_real_datasets_load(name, items, users, sizes):
    data = prepare_data(DataConfig(path=str(real_data(name)), codebook_sizes=sizes))
    assert (len(data.catalog), len(data.dataset.histories)) == (items, users)
    assert len(data.split.test) == users


def test_inspection_shows_what_is_learned():
    """Each document is somebody's history, item by item."""
    synthetic = SyntheticConfig(items=60, users=50, codebook_sizes=(8, 8, 8), children=(8, 4, 4))
    config = Config("x", data=DataConfig(synthetic=synthetic, sequence_length=64))
    said = []
    inspect(config, 4, said.append)
    data = prepare_data(config.data)
    assert "60 items, 50 users" in said[0] and "rows of 64 tokens" in said[1]
    documents = "\n".join(said[2:]).split("\n\n")
    assert len(documents) == 4
    histories = [data.dataset.histories.of(user)[:-2].tolist() for user in range(50)]
    for document in documents:
        head, bos, *lines = document.strip().split("\n")
        assert head.startswith("row ") and bos == "  BOS"
        items = []
        for line in lines:
            found = re.fullmatch(r"  ([\d-]+) +item (\d+) (synthetic \d+)( or .*)?", line)
            item = int(found[2])
            assert found[1] == "-".join(map(str, data.catalog.sids[item]))
            items.append(int(data.catalog.group_of_item[item]))
        groups = [data.catalog.group_of_item[history].tolist() for history in histories]
        assert any(items == own[i : i + len(items)] for own in groups for i in range(len(own)))
    rows, of_batch = int(re.search(r"packed: (\d+) rows", said[1])[1]), []
    inspect(config, 1000, of_batch.append, batch=5)
    shown = [int(line.split()[1].strip(",")) for line in of_batch if line.startswith("\nrow ")]
    wanted = rows_of_batch(5, rows, config.data.batch_size, config.seed)
    assert list(dict.fromkeys(shown)) == list(dict.fromkeys(wanted)) and len(set(wanted)) > 1
