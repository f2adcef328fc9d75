"""Datasets: what is refused and how, splits, packing, the pipeline, the synthetic process."""

import dataclasses
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import real_data

from prefixmem_jax.config import DataConfig, SyntheticConfig
from prefixmem_jax.data.formats.parquet import Dataset, Histories, load_dataset, save_dataset
from prefixmem_jax.data.pipeline import training_batches
from prefixmem_jax.data.prepare import prepare_data
from prefixmem_jax.data.sequences import batches, example_rows, pack_training_rows, prompt_rows
from prefixmem_jax.data.splits import split_dataset
from prefixmem_jax.data.synthetic import make_synthetic
from prefixmem_jax.errors import UserError
from prefixmem_jax.semantic_ids.catalog import Catalog
from prefixmem_jax.semantic_ids.space import SidSpace

SMALL = SyntheticConfig(items=200, users=150, codebook_sizes=(8, 8, 8), children=(8, 4, 4))


@pytest.fixture
def folder(tmp_path):
    dataset, _ = make_synthetic(SMALL)
    times = np.sort(np.random.default_rng(0).integers(0, 1000, len(dataset.histories.items)))
    histories = dataclasses.replace(dataset.histories, timestamps=times)
    save_dataset(tmp_path / "good", dataclasses.replace(dataset, histories=histories))
    return tmp_path / "good"


def test_saved_datasets_load_the_same(folder):
    loaded = load_dataset(folder, codebook_sizes=(8, 8, 8))
    dataset, _ = make_synthetic(SMALL)
    assert np.array_equal(loaded.catalog.sids, dataset.catalog.sids)
    assert list(loaded.catalog.titles) == list(dataset.catalog.titles)
    assert np.array_equal(loaded.histories.items, dataset.histories.items)
    assert np.array_equal(loaded.histories.offsets, dataset.histories.offsets)
    assert loaded.catalog.space == dataset.catalog.space
    assert load_dataset(folder).sha256 == loaded.sha256


def test_items_may_come_in_any_order(folder):
    table = pq.read_table(folder / "items.parquet")
    pq.write_table(table.take(np.random.default_rng(0).permutation(200)), folder / "items.parquet")
    dataset, _ = make_synthetic(SMALL)
    assert np.array_equal(load_dataset(folder).catalog.sids, dataset.catalog.sids)


def change(file, column, row, value):
    def damage(folder):
        path = folder / file
        table = pq.read_table(path)
        values = table[column].to_pylist()
        values[row] = value
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
        (change("histories.parquet", "timestamps", 0, list(range(100, 0, -1))), "histories.parquet: row 0: 100 timestamps for"),
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
        load_dataset(folder, codebook_sizes=(8, 8, 8))
    assert words in str(error.value)
    assert "\n" not in str(error.value)


def test_timestamps_must_go_forward(folder):
    first = pq.read_table(folder / "histories.parquet")["item_ids"][0].as_py()
    change("histories.parquet", "timestamps", 0, list(range(len(first), 0, -1)))(folder)
    with pytest.raises(UserError, match="row 0: timestamps go backwards"):
        load_dataset(folder)


def tiny_dataset(sequences, timestamps=None):
    sids = np.arange(40).reshape(20, 2)
    catalog = Catalog(sids % 8, [None] * 20, SidSpace((8, 8)))
    offsets = np.cumsum([0] + [len(s) for s in sequences])
    times = None if timestamps is None else np.concatenate(timestamps)
    histories = Histories(
        np.concatenate(sequences), offsets, [f"u{i}" for i in range(len(sequences))], times
    )
    return Dataset("tiny", catalog, histories, "")


def test_leave_two_out():
    split = split_dataset(tiny_dataset([[1, 2, 3, 4], [5, 6], [7, 8, 9]]), "leave_two_out", 0.1)
    assert [s.tolist() for s in split.train] == [[1, 2], [5, 6], [7]]
    assert [(e.user, e.history.tolist(), e.target) for e in split.validation] == [
        (0, [1, 2], 3),
        (2, [7], 8),
    ]
    assert [(e.user, e.history.tolist(), e.target) for e in split.test] == [
        (0, [1, 2, 3], 4),
        (2, [7, 8], 9),
    ]


def test_time_split_never_trains_on_the_held_out_period():
    rng = np.random.default_rng(0)
    sequences = [rng.integers(0, 20, 10) for _ in range(50)]
    times = [np.sort(rng.integers(0, 10_000, 10)) for _ in range(50)]
    dataset = tiny_dataset(sequences, times)
    split = split_dataset(dataset, "time", 0.1)
    first, second = np.quantile(np.concatenate(times), [0.8, 0.9])
    assert sum(map(len, split.train)) == sum(int((t < first).sum()) for t in times)
    for examples, begin, end in (
        (split.validation, first, second),
        (split.test, second, np.inf),
    ):
        for example in examples:
            at = len(example.history)
            assert begin <= times[example.user][at] < end
            assert np.array_equal(sequences[example.user][:at], example.history)
            assert sequences[example.user][at] == example.target
            assert (times[example.user][:at] < begin).all()
    with pytest.raises(UserError, match="timestamps"):
        split_dataset(tiny_dataset(sequences), "time", 0.1)


def test_user_split_is_disjoint_and_depends_on_ids_alone():
    sequences = [np.array([i % 20, (i + 1) % 20, (i + 2) % 20]) for i in range(400)]
    dataset = tiny_dataset(sequences)
    split = split_dataset(dataset, "users", 0.1)
    held_out = {e.user for e in split.validation} | {e.user for e in split.test}
    assert not {e.user for e in split.validation} & {e.user for e in split.test}
    assert len(held_out) + len(split.train) == 400
    assert 20 < len(split.validation) < 65 and 20 < len(split.test) < 65
    reversed_histories = dataclasses.replace(
        dataset.histories, user_ids=dataset.histories.user_ids[::-1]
    )
    again = split_dataset(dataclasses.replace(dataset, histories=reversed_histories), "users", 0.1)
    assert {399 - e.user for e in again.test} == {e.user for e in split.test}


def test_packing_keeps_every_item_once_and_documents_apart():
    dataset, _ = make_synthetic(SMALL)
    split = split_dataset(dataset, "leave_two_out", 0.1)
    rows = pack_training_rows(dataset.catalog, split.train, 40, 6, seed=0)
    documents = []
    for tokens, segments, positions, mask in zip(
        rows["tokens"], rows["segment_ids"], rows["positions"], rows["loss_mask"], strict=True
    ):
        for segment in range(1, segments.max() + 1):
            at = np.flatnonzero(segments == segment)
            assert np.array_equal(at, np.arange(at[0], at[-1] + 1))
            assert np.array_equal(positions[at], np.arange(len(at)))
            assert tokens[at[0]] == dataset.catalog.space.bos_token
            assert mask[at].tolist() == [1] * (len(at) - 1) + [0]
            documents.append(dataset.catalog.space.decode(tokens[at[1:]].reshape(-1, 3)))
        assert not tokens[segments == 0].any() and not mask[segments == 0].any()
    expected = []
    for items in split.train:
        for end in range(len(items), 0, -6):
            expected.append(dataset.catalog.sids[items[max(0, end - 6) : end]])
    assert sorted(d.tobytes() for d in documents) == sorted(e.tobytes() for e in expected)
    assert (rows["segment_ids"] > 0).mean() > 0.9
    same = pack_training_rows(dataset.catalog, split.train, 40, 6, seed=0)
    assert all(np.array_equal(same[name], rows[name]) for name in rows)
    with pytest.raises(UserError, match="sequence_length=3"):
        pack_training_rows(dataset.catalog, split.train, 3, 6, seed=0)


def test_examples_predict_only_the_target_and_prompts_stop_before_it():
    dataset, _ = make_synthetic(SMALL)
    examples = split_dataset(dataset, "leave_two_out", 0.1).test[:7]
    rows = example_rows(dataset.catalog, examples, 5)
    prompts = prompt_rows(dataset.catalog, [e.history for e in examples], 5)
    for row, example in enumerate(examples):
        predicted = np.flatnonzero(rows["loss_mask"][row]) + 1
        assert np.array_equal(
            rows["tokens"][row, predicted], dataset.catalog.tokens[example.target]
        )
        length = (prompts["segment_ids"][row] > 0).sum()
        assert length == 1 + 3 * min(5, len(example.history)) == predicted[0]
        assert np.array_equal(prompts["tokens"][row, :length], rows["tokens"][row, :length])
    pieces = batches(rows, 4)
    assert [len(p["tokens"]) for p in pieces] == [4, 4] and not pieces[1]["loss_mask"][3].any()


def test_pipeline_reshuffles_each_epoch_and_resumes_anywhere():
    rows = {"tokens": np.arange(10)[:, None]}

    def draw(iterator, count):
        return [next(iterator)["tokens"][:, 0].tolist() for _ in range(count)]

    whole = draw(training_batches(rows, 2, seed=0), 12)
    assert all(sorted(np.concatenate(whole[i : i + 5])) == list(range(10)) for i in (0, 5))
    assert whole[:5] != whole[5:10]
    iterator = training_batches(rows, 2, seed=0)
    draw(iterator, 7)
    resumed = training_batches(rows, 2, seed=0)
    resumed.set_state(iterator.get_state())
    assert draw(resumed, 5) == whole[7:]
    with pytest.raises(UserError, match="only 10 rows"):
        training_batches(rows, 11, seed=0)


def test_the_synthetic_optimum_is_the_true_distribution():
    """The stated next-item probabilities match what the process draws, and sum to one."""
    config = dataclasses.replace(SMALL, items=30, users=40_000, groups=3, max_length=4)
    dataset, world = make_synthetic(config)
    seconds: dict[int, list[int]] = {}
    for user in range(len(dataset.histories)):
        items = dataset.histories.of(user)
        seconds.setdefault(int(items[0]), []).append(int(items[1]))
    first = max(seconds, key=lambda item: len(seconds[item]))
    expected = world.next_item_distribution([first])
    assert abs(expected.sum() - 1) < 1e-9
    drawn = np.bincount(seconds[first], minlength=30) / len(seconds[first])
    deviation = np.sqrt(expected * (1 - expected) / len(seconds[first]))
    assert (np.abs(drawn - expected) < 5 * deviation + 1e-9).all()
    # The history tells the taste group: the same last item, other earlier ones, other odds.
    liked = np.argmax(world.base, axis=1)
    one, other = (world.next_item_distribution([liked[g]] * 3 + [first]) for g in (0, 1))
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
