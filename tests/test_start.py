"""From two CSV files to recommendations by own ids, as a new user would."""

import json
import random
import re

import pytest
from conftest import prefixmem, python_without_us

from prefixmem_jax.errors import UserError
from prefixmem_jax.start import start

COLORS, THINGS = ["red", "green", "blue", "black"], ["lamp", "chair", "table", "cup", "rug"]
SMALL = [
    "steps=6", "model.layers=1", "evaluation.validation_examples=30", "data.batch_size=8", "evaluation.users=30",
    "evaluation.every_steps=3",
]  # fmt: skip


@pytest.fixture(scope="module")
def started(tmp_path_factory):
    """SIDs of five levels, some of them shared."""
    folder, rng = tmp_path_factory.mktemp("start"), random.Random(0)
    titles = [f'{COLORS[n % 4]} {THINGS[n % 5]}, "{n // 20}"' for n in range(200)]
    lines = ["sku;name", *(f"S{n:03d};{title}" for n, title in enumerate(titles))]
    (folder / "items.csv").write_text("\n".join(lines).replace('"', "'").replace(";", "\t"))
    (folder / "items.csv").rename(folder / "items.tsv")
    log = ["customer,sku,when"]
    for user in range(150):
        log += [
            f"c{user},S{rng.randrange(200):03d},2025-01-{day + 1:02d} 10:00:00"
            for day in range(rng.randint(3, 9))
        ]
    (folder / "log.csv").write_text("\n".join(log))
    command = [
        "start", folder / "items.tsv", folder / "log.csv", "--out", folder / "mine",
        "source.user=customer", "source.item=sku", "source.time=when", "source.item_id=sku",
        "quantizer.codes=(5,6,3,4,7)", "collisions=keep", *SMALL,
    ]  # fmt: skip
    return folder / "mine", titles, prefixmem(*command)


def test_it_ends_with_results_beside_the_heuristics(started):
    out, _, done = started
    results = json.loads((out / "results.json").read_text())
    assert set(results) == {
        "baseline", "prefixmem", "heuristic_popularity", "heuristic_successor",
        "heuristic_transition", "heuristic_item_knn",
    }  # fmt: skip
    sid_encoder = results["prefixmem"]["config"]["sid_encoder"]
    assert sid_encoder["target_levels"] == [1, 3, 4, 5] and sid_encoder["orders"] == 5
    heads = [results[name]["config"]["item_head"]["vectors"] for name in ("baseline", "prefixmem")]
    assert heads == ["own", "memory"]
    for level in range(1, 6):
        assert 0 <= results["prefixmem"][f"tf_accuracy/level_{level}"] <= 1
    assert "150 users, 200 items" in done.stdout and "bits after prefix" in done.stdout
    for name in ("report.html", "data/sids.html"):
        assert "data:image/png;base64," in (out / name).read_text()


def test_files_that_are_none_leave_nothing(tmp_path, refused):
    (tmp_path / "log.csv").write_text("user_id,item_id\n1\n")
    for log, words in (("log.csv", "log.csv: not readable"), ("no.csv", "no such file or folder")):
        assert words in refused("start", tmp_path / log, "--out", tmp_path / "a" / "b")
    assert [path.name for path in tmp_path.iterdir()] == ["log.csv"]


def test_data_that_have_sids_get_no_others(tmp_path):
    (tmp_path / "x").mkdir()
    for name, content in (
        ("inter", {"ann": ["a", "b", "a"]}),
        ("index", {"a": ["<a_0>"], "b": ["<a_1>"]}),
    ):
        (tmp_path / "x" / f"x.{name}.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"quantizer\.seed=1: these items have SIDs; none are made"):
        start([tmp_path / "x"], tmp_path / "o", None, ["source=lc_rec", "quantizer.seed=1"])


def test_items_are_called_as_their_owner_calls_them(started):
    out, titles, done = started
    shown = re.findall(r"^ +-[\d.]+  (S\d{3}) \((.*)\)$", done.stdout, re.MULTILINE)
    assert len(shown) == 15  # five for each of three users
    answer = prefixmem("recommend", out / "prefixmem", "--history", "S003,S199", "--top", 4)
    lines = [line.split(maxsplit=5) for line in answer.stdout.splitlines()[1:]]
    shown += [(line[3], line[5]) for line in lines]
    assert all(titles[int(key[1:])].replace('"', "'") == title for key, title in shown)
    wrong = prefixmem("recommend", out / "prefixmem", "--history", "S003,3", expect=2)
    assert "'3' is not an item id; expected keys of items.parquet" in wrong.stderr
    printed = python_without_us(f"""
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained({str(out / "export")!r}, trust_remote_code=True)
for one in model.recommend(["S003", "S199"], top=4):
    print(one.key, one.item)
try:
    model.recommend(["S003", "S200"])
except ValueError as error:
    print(error)
""")
    keys = [line[3] for line in lines]
    assert printed.splitlines() == [
        *(f"{key} {int(key[1:])}" for key in keys),
        "item S200 is not in the catalogue of 200 items",
    ]
