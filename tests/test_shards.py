"""Packed rows in files: the same documents, drawn like rows in memory, on any number of processes."""

import collections
import dataclasses
import itertools
import json
import os
import shutil
import typing
from pathlib import Path

import jax
import numpy as np
import pyarrow.parquet as pq
import pytest
from conftest import prefixmem, python_process
from test_splits import spelled

from prefixmem_jax.config import Config
from prefixmem_jax.config_files import load_config, to_json
from prefixmem_jax.config_groups import (
    CheckpointConfig,
    DataConfig,
    DecoderConfig,
    EvaluationConfig,
    SyntheticConfig,
)
from prefixmem_jax.data.batch import Batch
from prefixmem_jax.data.documents.catalogue import Catalogue
from prefixmem_jax.data.documents.document import Corpus
from prefixmem_jax.data.documents.items import Items
from prefixmem_jax.data.formats.parquet import write_dataset
from prefixmem_jax.data.pipeline import training_batches
from prefixmem_jax.data.prepare import fixed_sample, open_data, prepare_data
from prefixmem_jax.data.shards import PackedShards
from prefixmem_jax.data.splits import Split
from prefixmem_jax.data.synthetic import make_synthetic
from prefixmem_jax.errors import UserError
from prefixmem_jax.objectives.next_token import NextToken
from prefixmem_jax.runs.metrics import read_metrics
from prefixmem_jax.training.loop import train
from prefixmem_jax.training_rows import training_source

CONFIG = Config(
    "packed",
    steps=12,
    data=DataConfig(
        max_items=6,
        sequence_length=40,
        batch_size=8,
        synthetic=SyntheticConfig(
            items=150, users=400, codebook_sizes=(6, 8, 9), children=(6, 5, 5)
        ),
    ),
    model=DecoderConfig(layers=1, d_model=32, d_ff=64, query_heads=2, kv_heads=2, head_dim=16),
    checkpoint=CheckpointConfig(every_steps=5),
    evaluation=EvaluationConfig(every_steps=100, validation_examples=8),
    log_every_steps=1,
)


@pytest.fixture(scope="module")
def packed(tmp_path_factory) -> Config:
    """The config with its rows in five files, which two processes wrote."""
    folder = tmp_path_factory.mktemp("packed")
    (folder / "config.json").write_text(to_json(CONFIG))
    said = prefixmem(
        "data", "pack", folder / "config.json", "--out", folder / "rows",
        "--shards", 5, "--workers", 2,
    ).stdout  # fmt: skip
    assert f"in 5 files: data.packed={folder / 'rows'}" in said
    return dataclasses.replace(
        CONFIG, data=dataclasses.replace(CONFIG.data, packed=str(folder / "rows"))
    )


@pytest.fixture(scope="module")
def data():
    return prepare_data(CONFIG.data)


def documents_in(rows: Batch) -> collections.Counter:
    found = collections.Counter()
    for tokens, segments, mask, items in zip(
        rows.tokens, rows.segment_ids, rows.loss_mask, rows.next_item, strict=True
    ):
        for segment in range(1, segments.max() + 1):
            here = segments == segment
            found[(*tokens[here], *mask[here], *items[here])] += 1
    return found


def test_files_have_every_document_once(packed, data):
    source = training_source(packed, data)
    rows = stacked(source)
    assert isinstance(rows, Batch)
    whole = CONFIG.objective.training_rows(Corpus(data, CONFIG.data), CONFIG.seed)
    assert documents_in(rows) == documents_in(whole)
    assert len(source) <= len(whole.tokens) + 5


def test_kinds_of_documents_have_the_same_shares_in_files(data):
    """In files of many histories, of few and of none alike; an item is in one of them."""
    objective = NextToken(documents=(Items(weight=3.0), Catalogue(weight=1.0)))
    train = data.split.train
    ends = [0, 300, 310, 310, 400, *[400] * 200]
    parts = []
    for part, (first, stop) in enumerate(itertools.pairwise(ends)):
        split = dataclasses.replace(data.split, train=train.take(np.arange(first, stop)))
        corpus = Corpus(dataclasses.replace(data, split=split), CONFIG.data, part, len(ends) - 1)
        parts.append(corpus)
    counts = tuple(np.sum([objective.count_documents(part) for part in parts], axis=0).tolist())
    whole = Corpus(data, CONFIG.data)
    assert counts == objective.count_documents(whole)
    found = collections.Counter()
    for part in parts:
        found += documents_in(
            objective.training_rows(dataclasses.replace(part, counts=counts), CONFIG.seed)
        )
    expected = documents_in(objective.training_rows(whole, CONFIG.seed))
    assert set(found) == set(expected)

    def items_alone(documents: collections.Counter) -> int:
        return sum(times for one, times in documents.items() if np.float32(0.1) in one)

    assert items_alone(found) == pytest.approx(items_alone(expected), rel=0.1)
    assert found.total() == pytest.approx(expected.total(), rel=0.05)


def stacked(source: PackedShards) -> Batch:
    return jax.tree.map(lambda *leaves: np.stack(leaves), *(source[i] for i in range(len(source))))


def test_files_are_packed_piece_by_piece_as_memory_is(packed, data, tmp_path):
    """A file has users that follow each other; if there is but one piece, its rows are memory's."""
    train, ends = data.split.train, [400 * shard // 5 for shard in range(6)]
    parts = []
    for part, (first, stop) in enumerate(itertools.pairwise(ends)):
        split = dataclasses.replace(data.split, train=train.take(np.arange(first, stop)))
        corpus = Corpus(dataclasses.replace(data, split=split), CONFIG.data, part, 5)
        parts.append(CONFIG.objective.training_rows(corpus, CONFIG.seed))
    expected = jax.tree.map(lambda *leaves: np.concatenate(leaves), *parts)
    jax.tree.map(np.testing.assert_array_equal, stacked(training_source(packed, data)), expected)

    write_dataset(tmp_path / "data", data.dataset)
    config = dataclasses.replace(
        CONFIG, data=dataclasses.replace(CONFIG.data, synthetic=SyntheticConfig())
    )
    (tmp_path / "config.json").write_text(to_json(config))
    place = f"data.path={tmp_path / 'data'}"
    prefixmem(
        "data", "pack", tmp_path / "config.json", place, "--out", tmp_path / "rows", "--shards", 1
    )
    config = load_config(tmp_path / "config.json", [place, f"data.packed={tmp_path / 'rows'}"])
    read = prepare_data(config.data)
    whole = config.objective.training_rows(Corpus(read, config.data), config.seed)
    jax.tree.map(np.testing.assert_array_equal, stacked(training_source(config, read)), whole)


def sequences(split: Split) -> list[list[int]]:
    train = zip(split.train.starts, split.train.stops, strict=True)
    return [split.items[start:stop].tolist() for start, stop in train]


@pytest.mark.parametrize("kind", typing.get_args(typing.get_type_hints(DataConfig)["split"]))
def test_histories_in_a_file_are_read_and_split_by_piece_as_they_are_whole(kind, tmp_path):
    """Whatever the file's row groups, and wherever pieces start and end."""
    dataset, _ = make_synthetic(CONFIG.data.synthetic)
    times = np.sort(np.random.default_rng(0).integers(0, 1000, len(dataset.histories.items)))
    histories = dataclasses.replace(dataset.histories, timestamps=times)
    write_dataset(tmp_path, dataclasses.replace(dataset, histories=histories))
    path = tmp_path / "histories.parquet"
    pq.write_table(pq.read_table(path), path, row_group_size=37)
    options = DataConfig(path=str(tmp_path), split=kind, holdout=0.2)
    whole, stored = prepare_data(options), open_data(options)
    users = len(whole.dataset.histories)
    assert len(stored.dataset.histories) == users == 400
    assert stored.dataset.sha256 == whole.dataset.sha256
    bounds = stored.bounds(0, users, 300).tolist()
    assert bounds[0] == 0 and bounds[-1] == users and 10 < len(bounds) < 30
    found = collections.defaultdict(list)
    for first, stop in [*itertools.pairwise(bounds)]:
        piece = stored.piece(first, stop)
        here, there = piece.dataset.histories, whole.dataset.histories.piece(first, stop)
        for name in ("items", "offsets", "timestamps"):
            assert np.array_equal(getattr(here, name), getattr(there, name))
        assert list(here.user_ids) == list(there.user_ids)
        assert abs(len(here.items) - 300) < 80
        for name in ("validation", "test"):
            of_piece = spelled(getattr(piece.split, name))
            found[name] += [(first + user, *rest) for user, *rest in of_piece]
        found["train"] += sequences(piece.split)
    assert found["train"] == sequences(whole.split)
    for name in ("validation", "test"):
        assert found[name] == spelled(getattr(whole.split, name))
    for count in (0, 30):
        sample = whole.split.validation.take(fixed_sample(len(whole.split.validation), count))
        alone = stored.validation_alone(count)
        assert spelled(alone.split.validation) == spelled(sample) and not len(alone.split.train)
        assert alone.item_counts.tolist() == whole.item_counts.tolist()


PEAK = """
import resource, sys
from pathlib import Path
from prefixmem_jax.config_files import load_config
from prefixmem_jax.training_rows import pack

config = load_config("recommend/small", [f"data.path={sys.argv[1]}"])
pack(config, Path(sys.argv[1]) / "rows", shards=2, workers=1)
for whose in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN):
    print(resource.getrusage(whose).ru_maxrss)
"""


def test_packing_takes_no_more_memory_for_more_users(tmp_path):
    """Of the process that checks the histories, and of the one that packs them."""
    peaks = []
    for users in (60_000, 240_000):
        folder = tmp_path / str(users)
        prefixmem(
            "data", "generate", "--out", folder, f"users={users}",
            "codebook_sizes=(32,64,64,64)", "children=(32,8,8,8)",
        )  # fmt: skip
        process = python_process(PEAK, folder)
        out, said = process.communicate(timeout=400)
        assert process.returncode == 0, said
        peaks.append([int(line) for line in out.split()])
    assert all(more < 1.2 * less for less, more in zip(*peaks, strict=True)), peaks


def test_any_number_of_processes_draws_each_row_once_an_epoch(packed, data, monkeypatch):
    source = training_source(packed, data)
    epoch, batch = len(source), 8

    def drawn(processes, count, state=None):
        """Rows of the global batches, whoever draws them, and where all of them are afterwards."""
        parts, states = [], set()
        for process in range(processes):
            monkeypatch.setattr(jax, "process_count", lambda: processes)
            monkeypatch.setattr(jax, "process_index", lambda process=process: process)
            iterator = training_batches(source, batch, seed=4)
            if state is not None:
                iterator.set_state(state)
            parts.append([next(iterator) for _ in range(count)])
            states.add(json.dumps(iterator.get_state()))
        (after,) = states
        together = [np.concatenate([part[i].tokens for part in parts]) for i in range(count)]
        return [sorted(map(bytes, rows)) for rows in together], json.loads(after)

    steps = -(-epoch // batch)
    whole, _ = drawn(1, steps + 5)
    assert drawn(2, steps + 5)[0] == drawn(4, steps + 5)[0] == whole
    # So many batches are `batch` whole epochs, whether or not an epoch is whole batches.
    many, _ = drawn(1, epoch)
    rows = collections.Counter(bytes(source[i].tokens) for i in range(epoch))
    found = collections.Counter(row for batches in many for row in batches)
    assert found == {row: batch * count for row, count in rows.items()}
    # One process, then two, then four: the next batch is exactly the next one.
    start, state = drawn(1, 4)
    middle, state = drawn(2, 3, state)
    end, _ = drawn(4, steps - 2, state)
    assert start + middle + end == whole


@pytest.mark.usefixtures("first_device_alone")
def test_a_run_on_files_resumes_bit_identical(packed, tmp_path):
    state = jax.device_get(train(packed, tmp_path / "run"))
    shutil.copytree(tmp_path / "run", tmp_path / "cut")
    shutil.rmtree(tmp_path / "cut" / "checkpoints" / "12")
    resumed = jax.device_get(train(packed, tmp_path / "cut"))
    jax.tree.map(np.testing.assert_array_equal, resumed, state)
    whole, cut = (
        [record.get("loss") for record in read_metrics(tmp_path / name)] for name in ("run", "cut")
    )
    assert cut == whole and len(whole) >= 12


@pytest.mark.usefixtures("first_device_alone")
def test_a_file_that_vanishes_while_a_run_reads_it_is_named(packed, data, tmp_path, monkeypatch):
    """Where it has to be opened again, as over a network; or it is cut short, as it is."""
    copied = Path(shutil.copytree(packed.data.packed, tmp_path / "rows"))
    gone, cut = copied / "rows-00002.array_record", copied / "rows-00001.array_record"
    config = dataclasses.replace(packed, data=dataclasses.replace(packed.data, packed=str(copied)))
    read, reads = PackedShards._record, itertools.count()

    def vanishing(source, index):
        if next(reads) == 40:
            gone.unlink()
            source._records._readers[2] = None
        return read(source, index)

    source = training_source(config, data)
    assert all(len(source[i].tokens) for i in range(len(source)))
    os.truncate(cut, 50)
    with pytest.raises(UserError, match=r"rows-00001.array_record is damaged .*; pack again"):
        [source[i] for i in range(len(source))]
    shutil.copy(Path(packed.data.packed) / cut.name, cut)
    monkeypatch.setattr(PackedShards, "_record", vanishing)
    with pytest.raises(UserError) as error:
        train(config, tmp_path / "run", data)
    assert str(error.value) == f"{gone}: missing; pack again"


def test_what_is_not_what_was_packed_is_refused(packed, data, tmp_path):
    def refused(words, config):
        with pytest.raises(UserError, match=words):
            training_source(config, data)

    def other(**changes):
        return dataclasses.replace(packed, data=dataclasses.replace(packed.data, **changes))

    refused(
        r"packed with another data.max_items \(6 there, 5 here\); pack again", other(max_items=5)
    )
    refused("packed with another data.shared_sids", other(shared_sids="move"))
    refused("packed with another seed", dataclasses.replace(packed, seed=1))
    refused("no packed.json; expected what `prefixmem data pack` wrote", other(packed="/nowhere"))
    copied = Path(shutil.copytree(packed.data.packed, tmp_path / "rows"))
    damaged = copied / "rows-00003.array_record"
    whole = damaged.read_bytes()
    for content in (b"", whole[: len(whole) // 2], whole[:500] + b"\0\1\2" + whole[503:]):
        damaged.write_bytes(content)
        with pytest.raises(
            UserError, match=r"rows(: a file|/rows-00003\S+) is damaged .*; pack again"
        ):
            source = training_source(other(packed=str(copied)), data)
            [source[i] for i in range(len(source))]
    damaged.unlink()
    refused("rows-00003.array_record: missing; pack again", other(packed=str(copied)))
    (copied / "packed.json").write_text("{}")
    refused("packed.json: not what `prefixmem data pack` wrote", other(packed=str(copied)))
    (tmp_path / "config.json").write_text(to_json(CONFIG))
    said = prefixmem(
        "data", "pack", tmp_path / "config.json", "--out", tmp_path / "x", "--shards", 100_000,
        expect=2,
    ).stderr  # fmt: skip
    assert "there are 400 users" in said and not (tmp_path / "x").exists()
