"""`prefixmem sids`: a dataset without SIDs becomes one that can be trained on."""

import json
import signal
import time

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import prefixmem, python_process

from prefixmem_jax.config_groups import SyntheticConfig
from prefixmem_jax.data.formats.parquet import read_catalog, read_dataset, write_dataset
from prefixmem_jax.data.synthetic import make_synthetic
from prefixmem_jax.errors import UserError
from prefixmem_jax.models.new_tokens import read_codebooks
from prefixmem_jax.runs.checkpoint import saved_steps
from prefixmem_jax.runs.metrics import read_metrics
from prefixmem_jax.runs.run import Run
from prefixmem_jax.semantic_ids import texts, vectors
from prefixmem_jax.semantic_ids.space import SidSpace
from prefixmem_jax.sids import make_sids

COLORS, THINGS = ["red", "green", "blue", "black"], ["lamp", "chair", "table", "cup", "rug"]
TITLES = [f"{color} {thing} {n}" for color in COLORS for thing in THINGS for n in range(12)]
WAYS = ["quantizer.codes=(16,16)", "quantizer.iterations=3", "text_width=12"]


@pytest.fixture
def data(tmp_path):
    """Items with titles, in no order, and histories; no SIDs."""
    folder = tmp_path / "data"
    dataset, _ = make_synthetic(
        SyntheticConfig(items=240, users=100, codebook_sizes=(4, 4), children=(4, 4), liked_codes=2)
    )
    write_dataset(folder, dataset)
    order = np.random.default_rng(0).permutation(240)
    items = {"item_id": order, "title": [TITLES[item] for item in order]}
    pq.write_table(pa.table(items), folder / "items.parquet")
    return folder


def test_titles_become_sids_that_can_be_trained_on(data, tmp_path):
    done = prefixmem("sids", data, "--out", tmp_path / "x", *WAYS, "collisions=level")
    dataset = read_dataset(tmp_path / "x")
    catalog = dataset.catalog
    assert list(catalog.titles) == TITLES
    assert len(catalog.group_sids) == 240 and catalog.space.levels == 3
    assert len(dataset.histories) == 100
    # What is called alike is named alike.
    of_thing = {}
    for title, sid in zip(catalog.titles, catalog.sids.tolist(), strict=True):
        of_thing.setdefault(title.rsplit(" ", 1)[0], []).append(tuple(sid[:2]))
    assert np.mean([len(set(sids)) for sids in of_thing.values()]) < 4
    report = json.loads((tmp_path / "x" / "sids.json").read_text())
    assert report["distinct"] == 240 and len(report["levels"]) == 3
    assert 0 < report["levels"][0]["counting_accuracy"] < 1
    assert report["levels"][1]["reconstruction_error"] < report["levels"][0]["reconstruction_error"]
    assert "bits after prefix" in done.stdout and "neighbours together" in done.stdout
    page = (tmp_path / "x" / "sids.html").read_text()
    assert "data:image/png;base64," in page and 'src="sids' not in page
    sizes = json.loads((tmp_path / "x" / "sids_config.json").read_text())["quantizer"]["codes"]
    found = read_codebooks(tmp_path / "x" / "codebooks.npz", SidSpace((*sizes, 12)))
    assert [array.shape for array in found] == [(16, 12), (16, 12), (12, 12)]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "x"]


def test_sids_that_are_there_are_reported_on(data, tmp_path, refused):
    """As `sids` did of those it made; of another column, too; mistakes end in one line."""
    out, vectors_of = tmp_path / "x", tmp_path / "v.npz"
    embedding = np.random.default_rng(0).standard_normal((240, 8)).astype(np.float32)
    np.savez(vectors_of, item_id=np.arange(240), embedding=embedding)
    made = make_sids(data, out, vectors_of, WAYS)
    done = prefixmem("data", "report", out, "--embeddings", vectors_of, "--out", tmp_path / "r")
    found = json.loads((tmp_path / "r" / "sids.json").read_text())
    for one, wanted in zip(found["levels"], made["levels"], strict=True):
        wanted.pop("reconstruction_error")  # known where they are made
        assert one == wanted | {"codes": one["codes"], "dead": one["codes"] - one["used"]}
    assert done.stdout.startswith("240 items,") and "neighbours together" in done.stdout
    assert (tmp_path / "r" / "sids.html").is_file()
    table = pq.read_table(out / "items.parquet")
    pq.write_table(table.append_column("other", [[[n] for n in range(240)]]), out / "items.parquet")
    done = prefixmem("data", "report", out, "data.sid_column=other")
    assert "240 distinct SIDs, 0 items share" in done.stdout and "neighbours" not in done.stdout
    for key, words in (("data.sid_column=none_such", "no column"), ("data.colum=x", "data.colum")):
        assert words in refused("data", "report", out, key, "--out", tmp_path / "none")
        assert not (tmp_path / "none").exists()


def test_vectors_are_matched_by_item(data, tmp_path):
    """Whatever the order of the files; the same SIDs from Parquet, .npz and .npy."""
    rng = np.random.default_rng(0)
    embedding = rng.standard_normal((240, 8)).astype(np.float32)
    order = rng.permutation(240)
    np.savez(tmp_path / "v.npz", item_id=np.arange(240), embedding=embedding)
    table = {"embedding": list(embedding[order]), "item_id": order}
    pq.write_table(pa.table(table), tmp_path / "v.parquet", row_group_size=50)
    np.save(tmp_path / "v.npy", embedding[order])
    np.save(tmp_path / "v.item_id.npy", order)
    found = []
    for name in ("v.npz", "v.parquet", "v.npy"):
        make_sids(data, tmp_path / name[2:], tmp_path / name, [*WAYS, "collisions=move"])
        found.append(read_dataset(tmp_path / name[2:]).catalog)
    np.testing.assert_array_equal(found[0].sids, found[1].sids)
    np.testing.assert_array_equal(found[0].sids, found[2].sids)
    first = found[0].sids[:, 0]
    of_prefix = np.bincount(first)  # each has room for 16
    assert len(found[0].group_sids) == np.minimum(of_prefix, 16).sum()
    centres = np.stack([embedding[first == code].mean(axis=0) for code in np.unique(first)])
    distances = ((embedding[:, None] - centres) ** 2).sum(axis=-1)
    assert np.mean(np.unique(first)[distances.argmin(axis=1)] == first) > 0.9


def test_a_killed_call_goes_on(data, tmp_path, monkeypatch):
    make_sids(data, tmp_path / "whole", None, WAYS)
    from prefixmem_jax.semantic_ids.quantizers.residual_kmeans import ResidualKMeans

    one_pass, passes = ResidualKMeans._pass, []

    def counting(*arguments):
        if len(passes) == 4:
            raise KeyboardInterrupt
        passes.append(1)
        return one_pass(*arguments)

    monkeypatch.setattr(ResidualKMeans, "_pass", counting)
    with pytest.raises(KeyboardInterrupt):
        make_sids(data, tmp_path / "killed", None, WAYS)
    assert not (tmp_path / "killed").exists()
    passes[:] = [1, 1]  # two are left
    make_sids(data, tmp_path / "killed", None, WAYS)
    whole, killed = (tmp_path / name / "items.parquet" for name in ("whole", "killed"))
    assert whole.read_bytes() == killed.read_bytes()
    passes[:] = [1] * 4  # nothing is left
    make_sids(data, tmp_path / "killed", None, [*WAYS, "collisions=keep"])
    make_sids(data, tmp_path / "killed", None, WAYS)
    assert whole.read_bytes() == killed.read_bytes()
    passes.clear()  # other ways begin afresh
    monkeypatch.setattr(ResidualKMeans, "_pass", one_pass)
    make_sids(data, tmp_path / "killed", None, [*WAYS, "quantizer.seed=1"])
    assert whole.read_bytes() != killed.read_bytes()


def test_an_autoencoder_is_trained_like_any_other_run(data, tmp_path):
    """It ends when it is told to and goes on; what it learnt gives new items their SIDs."""
    ways = ["quantizer=rq_vae", "quantizer.codes=(16,16)", "quantizer.hidden=(16,)"]
    ways += ["quantizer.batch_size=64", "text_width=12", "collisions=keep"]
    run = tmp_path / ".x.fit" / "run"
    call = [data, "--out", tmp_path / "x", *ways, "quantizer.steps=1000000"]
    script = "import sys; from prefixmem_jax.cli import main; sys.exit(main(sys.argv[1:]))"
    process = python_process(script, "sids", *call)
    try:
        while process.poll() is None and len(read_metrics(run)) < 3:
            time.sleep(0.1)
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 143, process.communicate()
    finally:
        process.kill()
    assert {"config.json", "data.json", "tensorboard"} <= {path.name for path in run.iterdir()}
    description = Run(run).data_description
    assert (description.items, description.codebook_sizes) == (240, (16, 16))
    assert saved_steps(run)
    assert not (tmp_path / "x").exists()
    done = prefixmem("sids", data, "--out", tmp_path / "x", *ways, "quantizer.steps=30")
    assert "rq_vae: step 30: validation loss" in done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "x"]
    report = json.loads((tmp_path / "x" / "sids.json").read_text())
    assert report["levels"][1]["reconstruction_error"] < 1
    found = read_codebooks(tmp_path / "x" / "codebooks.npz", SidSpace((16, 16)))
    assert [array.shape for array in found] == [(16, 12), (16, 12)]
    table = pq.read_table(data / "items.parquet").sort_by("item_id")
    more = table.set_column(0, "item_id", [np.arange(240, 480)])  # called as the others are
    pq.write_table(pa.concat_tables([table, more]), data / "items.parquet")
    make_sids(data, tmp_path / "more", None, earlier=tmp_path / "x")
    old, new = (read_catalog(tmp_path / name).sids for name in ("x", "more"))
    np.testing.assert_array_equal(new, np.concatenate([old, old]))


@pytest.mark.parametrize("collisions", ["keep", "level", "move"])
@pytest.mark.parametrize("keyed", [False, True])
def test_new_items_get_sids_and_old_ones_keep_theirs(data, tmp_path, collisions, keyed):
    """Also where new ones are called like old ones; found by key, wherever they stand."""
    table = pq.read_table(data / "items.parquet").sort_by("item_id")
    if keyed:
        table = table.append_column("key", [[f"k{n}" for n in range(240)]])
    pq.write_table(table.slice(0, 200), data / "items.parquet")
    (data / "histories.parquet").unlink()
    make_sids(data, tmp_path / "old", None, [*WAYS, f"collisions={collisions}"])
    again = table.slice(0, 20).set_column(0, "item_id", [list(range(240, 260))])
    if keyed:
        again = again.set_column(2, "key", [[f"k{n}" for n in range(240, 260)]])
    order = np.random.default_rng(0).permutation(260) if keyed else np.arange(260)
    table = pa.concat_tables([table, again]).take(order).set_column(0, "item_id", [np.arange(260)])
    pq.write_table(table, data / "items.parquet")
    make_sids(data, tmp_path / "new", None, earlier=tmp_path / "old")
    old, new = (read_catalog(tmp_path / name) for name in ("old", "new"))
    of_new = {int(item): new.sids[place].tolist() for place, item in enumerate(order)}
    assert [of_new[item] for item in range(200)] == old.sids.tolist()
    levels = 3 if collisions == "level" else 2
    assert len(of_new[255]) == levels
    for item in range(20):  # called alike, near each other
        assert of_new[240 + item][0] == of_new[item][0]
    if collisions == "level":
        assert len(new.group_sids) == 260
    with pytest.raises(UserError, match="says how SIDs are made; collisions=keep has no place"):
        make_sids(data, tmp_path / "x", None, ["collisions=keep"], earlier=tmp_path / "old")
    with pytest.raises(UserError, match="made of titles; leave --embeddings out"):
        make_sids(data, tmp_path / "x", tmp_path / "v.npz", earlier=tmp_path / "old")
    with pytest.raises(UserError, match=r"sids_config.json: not readable"):
        make_sids(data, tmp_path / "x", None, earlier=data)


def save(name, **arrays):
    return lambda folder: np.savez(folder / name, **arrays)


def save_array(name, array):
    return lambda folder: np.save(folder / f"{name}.npy", array)


def parquet(**columns):
    return lambda folder: pq.write_table(pa.table(columns), folder / "v.parquet")


IDS = list(range(240))
GOOD = [[1.0, float(item)] for item in IDS]


@pytest.mark.parametrize(
    "name, write, words",
    [
        ("v.npz", lambda folder: None, "v.npz: expected an .npz with arrays item_id and embedding"),
        ("v.npz", lambda folder: (folder / "v.npz").write_text("no"), "expected an .npz"),
        ("v.npz", save("v.npz", embedding=np.ones((240, 2))), "expected an .npz"),
        ("v.npz", save("v.npz", item_id=np.ones(240), embedding=np.ones((240, 2))), "must be ids"),
        ("v.npz", save("v.npz", item_id=np.arange(240), embedding=np.ones(240)), "must be floats"),
        ("v.npz", save("v.npz", item_id=np.arange(240), embedding=np.ones((240, 2), int)), "must be floats"),
        ("v.npz", save("v.npz", item_id=np.arange(239), embedding=np.ones((239, 2))), "no vector for item 239"),
        ("v.npz", save("v.npz", item_id=np.arange(240), embedding=np.ones((239, 2))), "240 item ids, but 239"),
        ("v.npz", save("v.npz", item_id=np.r_[0, IDS], embedding=np.ones((241, 2))), "item 0 has more than one"),
        ("v.npz", save("v.npz", item_id=np.arange(240), embedding=np.full((240, 2), np.nan)), "vector of item 0 is not finite"),
        ("v.npy", save_array("v", np.ones((240, 2))), "their item ids in v.item_id.npy beside it"),
        ("v.npy", save_array("v.item_id", np.arange(240)), "v.npy: expected vectors"),
        ("v.npy", lambda folder: [(folder / n).write_text("") for n in ("v.npy", "v.item_id.npy")], "v.npy: expected vectors"),
        ("v.parquet", lambda folder: None, "v.parquet: not a readable Parquet file"),
        ("v.parquet", parquet(item_id=IDS), "no column 'embedding'"),
        ("v.parquet", parquet(embedding=GOOD), "no column 'item_id'"),
        ("v.parquet", parquet(item_id=IDS, embedding=IDS), "expected lists of floats"),
        ("v.parquet", parquet(item_id=list(map(str, IDS)), embedding=GOOD), "must hold integers"),
        ("v.parquet", parquet(item_id=IDS, embedding=[*GOOD[:-1], [1.0]]), "row 239: embedding has 1 numbers, row 0 has 2"),
        ("v.parquet", parquet(item_id=IDS, embedding=[*GOOD[:-1], None]), "row 239: embedding has 0 numbers"),
        ("v.parquet", parquet(item_id=IDS, embedding=[*GOOD[:-1], [1.0, None]]), "vector of item 239 is not finite"),
        ("v.parquet", parquet(item_id=IDS[:0], embedding=pa.array([], pa.list_(pa.float32()))), "the file has no rows"),
    ],
)  # fmt: skip
def test_vectors_that_do_not_fit(data, tmp_path, name, write, words):
    write(tmp_path)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(UserError, match=words):
        make_sids(data, tmp_path / "x", tmp_path / name, WAYS)
    assert sorted(tmp_path.iterdir()) == before  # nothing is left behind


@pytest.mark.parametrize(
    "changes, words",
    [
        (["quantizer.codes=(500,)"], "240 vectors for 500 codes"),
        (["quantizer.code=3"], "did you mean quantizer.codes"),
        (["quantizer.iterations=0"], "quantizer.iterations: expected"),
        (["collisions=drop"], "collisions: 'drop' is not one of keep, level, move"),
        (["quantizer=k_means"], "no kind 'k_means'; did you mean residual_kmeans"),
    ],
)
def test_ways_that_cannot_be(data, tmp_path, changes, words):
    with pytest.raises(UserError, match=words):
        make_sids(data, tmp_path / "x", None, changes)
    assert not (tmp_path / "x").exists()


def test_vectors_are_from_one_place(data, tmp_path):
    np.savez(tmp_path / "v.npz", item_id=np.arange(240), embedding=np.ones((240, 2)))
    with pytest.raises(UserError, match="--embeddings and text_model both say what vectors are"):
        make_sids(data, tmp_path / "x", tmp_path / "v.npz", [*WAYS, "text_model=some"])


def test_titles_without_words_are_no_vectors(data, tmp_path):
    pq.write_table(pa.table({"item_id": IDS, "title": ["?"] * 240}), data / "items.parquet")
    with pytest.raises(UserError, match="240 titles with 0 different words are too few"):
        make_sids(data, tmp_path / "x", None, WAYS)


def test_new_titles_have_the_vectors_of_old_ones():
    fitted = texts.TextVectors.fit(TITLES, 8, 0)
    again = texts.TextVectors(fitted.arrays)(["red lamp 3", "nothing known", None])
    np.testing.assert_allclose(again[0], fitted(TITLES)[3], atol=1e-6)
    assert not again[1:].any() and np.linalg.norm(again[0]) == pytest.approx(1, abs=1e-5)


def test_vectors_of_which_one_is_another_are_others():
    array = np.ones((5000, 3))
    digests = {vectors.Vectors(array, None, "x").sha256 for _ in range(2)}
    for row in (0, 1, 4999):
        other = array.copy()
        other[row, 2] = 2
        digests.add(vectors.Vectors(other, None, "x").sha256)
    assert len(digests) == 4


def test_ids_may_be_unsigned(tmp_path):
    ids, array = np.array([1, 0, 2**40], np.uint64), np.arange(6.0).reshape(3, 2)
    np.savez(tmp_path / "v.npz", item_id=ids, embedding=array)
    found = vectors.read_vectors(tmp_path / "v.npz", 2, None, tmp_path / "unpacked")
    np.testing.assert_array_equal(found.take(np.arange(2)), array[[1, 0]])


def test_a_file_larger_than_a_piece_is_read_in_pieces(monkeypatch):
    monkeypatch.setattr(vectors, "PIECE", 10)
    array = np.arange(42.0).reshape(21, 2)
    pieces = list(vectors.Vectors(array, None, "x").pieces())
    assert [len(piece) for _, piece in pieces] == [5, 5, 5, 5, 1]
    np.testing.assert_array_equal(np.concatenate([piece for _, piece in pieces]), array)
