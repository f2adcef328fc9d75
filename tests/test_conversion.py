"""Raw data of several kinds become the same dataset; what is wrong in them is told in a line."""

import gzip
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import prefixmem

from prefixmem_jax.config_files import override
from prefixmem_jax.data.conversion import ConversionConfig, convert
from prefixmem_jax.data.formats.parquet import read_dataset, read_titles
from prefixmem_jax.errors import UserError

# Who met what when, in no order; "cup" is listed and never met, "sofa" is met and not listed.
LOG = [
    ("ann", "lamp", 30), ("bob", "rug", 10), ("ann", "rug", 20), ("ann", "desk", 40),
    ("bob", "desk", 11), ("eve", "sofa", 5), ("bob", "lamp", 12), ("eve", "rug", 6),
]  # fmt: skip
TITLES = {"desk": "Oak desk", "lamp": "Red lamp", "cup": "Cup, blue", "rug": None}
HISTORIES = {
    "ann": ["rug", "lamp", "desk"],
    "bob": ["rug", "desk", "lamp"],
    "eve": ["sofa", "rug"],
}


def csv(rows, header, separator=","):
    quoted = (
        separator.join(f'"{x}"' if separator in str(x) else str(x) for x in row) for row in rows
    )
    return "\n".join([separator.join(header), *quoted]) + "\n"


def titles_of(items):
    return [(item, title or "") for item, title in items.items()]


def write_csv(folder):
    (folder / "items.csv").write_text(csv(titles_of(TITLES), ["item_id", "title"]))
    (folder / "log.csv").write_text(csv(LOG, ["user_id", "item_id", "timestamp"]))
    return ["items.csv", "log.csv"], []


def write_jsonl(folder):
    items = [{"sku": item, "label": title} for item, title in TITLES.items()]
    log = [{"who": u, "sku": i, "when": f"2024-01-01T00:00:{t:02d}"} for u, i, t in LOG]
    for name, rows in (("items.jsonl", items), ("log.jsonl.gz", log)):
        text = "".join(json.dumps(row) + "\n" for row in rows).encode()
        (folder / name).write_bytes(gzip.compress(text) if name.endswith("gz") else text)
    mapping = ["user=who", "item=sku", "time=when", "item_id=sku", "title=label"]
    return ["items.jsonl", "log.jsonl.gz"], [f"source.{key}" for key in mapping]


def write_parquet(folder):
    users, items, times = zip(*LOG, strict=True)
    pq.write_table(
        pa.table({"user": users, "item": items, "ts": np.array(times) / 2}), folder / "log.parquet"
    )
    (folder / "items.tsv").write_text(csv(titles_of(TITLES), ["id", "name"], "\t"))
    return ["items.tsv", "log.parquet"], []


def write_amazon_2014(folder):
    items = "".join(
        f"{{'asin': '{i}', 'title': '{t}'}}\n" if t else f"{{'asin': '{i}'}}\n"
        for i, t in TITLES.items()
    )
    reviews = [{"reviewerID": u, "asin": i, "unixReviewTime": t, "overall": 5.0} for u, i, t in LOG]
    (folder / "meta.json.gz").write_bytes(gzip.compress(items.encode()))
    (folder / "reviews.json.gz").write_bytes(
        gzip.compress("".join(json.dumps(r) + "\n" for r in reviews).encode())
    )
    return ["meta.json.gz", "reviews.json.gz"], ["source=amazon_reviews"]


def write_amazon_2023(folder):
    items = [{"parent_asin": i, "title": t} for i, t in TITLES.items()]
    reviews = [
        {"user_id": u, "parent_asin": i, "asin": "x", "timestamp": t, "rating": 4.0}
        for u, i, t in LOG
    ]
    reviews.append({"user_id": "ann", "parent_asin": "bad", "timestamp": 1, "rating": 2.0})
    for name, rows in (("meta.jsonl", items), ("reviews.jsonl", reviews)):
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return ["meta.jsonl", "reviews.jsonl"], ["source=amazon_reviews", "source.least_rating=3"]


def write_recbole(folder):
    (folder / "x").mkdir()
    header = ["user_id:token", "item_id:token", "timestamp:float"]
    (folder / "x" / "x.inter").write_text(csv(LOG, header, "\t"))
    (folder / "x" / "x.item").write_text(
        csv(titles_of(TITLES), ["item_id:token", "title:token_seq"], "\t")
    )
    return ["x"], ["source=recbole"]


def write_lc_rec(folder):
    (folder / "x").mkdir()
    about = {item: {"title": title} for item, title in TITLES.items()}
    index = {item: [f"<a_{n}>", f"<b_{n % 2}>"] for n, item in enumerate([*TITLES, "sofa"])}
    for name, content in (("inter", HISTORIES), ("item", about), ("index", index)):
        (folder / "x" / f"x.{name}.json").write_text(json.dumps(content))
    return ["x"], ["source=lc_rec"]


def run(tmp_path, paths, overrides, *more):
    config = ConversionConfig()
    for text in (*overrides, *more):
        config = override(config, text)
    return convert(config, [tmp_path / path for path in paths], tmp_path / "out")


def histories(folder):
    table = pq.read_table(folder / "histories.parquet").to_pydict()
    _, keys = read_titles(folder)
    named = [[keys[item] for item in items] for items in table["item_ids"]]
    return dict(zip(table["user_id"], named, strict=True))


@pytest.mark.parametrize(
    "write",
    [write_csv, write_jsonl, write_parquet, write_amazon_2014, write_amazon_2023, write_recbole, write_lc_rec],
)  # fmt: skip
def test_every_source_gives_the_same_histories_and_titles(tmp_path, write):
    paths, overrides = write(tmp_path)
    found = run(tmp_path, paths, overrides)
    assert histories(tmp_path / "out") == HISTORIES
    titles, keys = read_titles(tmp_path / "out")
    named = {key: title or None for key, title in zip(keys, titles, strict=True)}
    expected = TITLES | {"sofa": None}
    if write in (write_amazon_2014, write_amazon_2023):  # metadata list all that there ever was
        expected = {key: title for key, title in expected.items() if key != "cup"}
    assert named == expected
    assert (found.users, found.items, found.interactions) == (3, len(expected), 8)
    assert read_dataset(tmp_path / "out", "item_id").histories.items.tolist() == [
        keys.index(item) for history in HISTORIES.values() for item in history
    ]


def test_sids_come_along(tmp_path):
    run(tmp_path, *write_lc_rec(tmp_path))
    catalog = read_dataset(tmp_path / "out").catalog
    assert catalog.sids.tolist() == [[0, 0], [1, 1], [2, 0], [3, 1], [4, 0]]


def test_the_rare_are_left_out_until_none_is_rare(tmp_path):
    """Sofa goes, then eve, and rug stays with two."""
    found = run(tmp_path, *write_csv(tmp_path), "k_core=2")
    assert histories(tmp_path / "out") == {user: HISTORIES[user] for user in ("ann", "bob")}
    assert (found.items, found.interactions, found.raw_interactions) == (3, 6, 8)
    assert "2 left out" in found.describe()
    with pytest.raises(UserError, match="no user and item have 4 interactions each"):
        run(tmp_path, ["items.csv", "log.csv"], [], "k_core=4")


def test_what_a_log_has_twice_counts_once(tmp_path):
    """Another time, item or user makes it another interaction."""
    ann, desk, time = LOG[0][0], "desk", 100
    log = [[ann, "lamp", 50], [ann, desk, time], [ann, desk, time], [ann, desk, time + 1]]
    log += [["bob", desk, time], [ann, "rug", time], [ann, desk, time]]
    (tmp_path / "log.csv").write_text(csv(log, ["user_id", "item_id", "timestamp"]))
    found = run(tmp_path, ["log.csv"], [])
    assert histories(tmp_path / "out") == {
        ann: ["lamp", "desk", "rug", "desk"], "bob": ["desk"]
    }  # fmt: skip
    assert (found.repeated, found.interactions) == (2, 5)
    assert "(2 left out, 2 of them the same user, item and time again)" in found.describe()


@pytest.mark.parametrize("timed", [True, False])
def test_people_under_two_ids_are_a_leak(tmp_path, timed):
    """Where a hundredth of the users may be: one of 99 is too many, and of a hundred not."""
    rng = np.random.default_rng(0)
    header = ["user_id", "item_id", "timestamp"][: 2 + timed]

    def converted(users, copies, change=lambda row: row):
        log = [
            [f"u{u}", f"i{i}", t]
            for u in range(users)
            for t, i in enumerate(rng.integers(40, size=6))
        ]
        log += [change([f"again{u}", i, t]) for u, i, t in log if u in copies]
        log += [[f"new{u}", f"i{u}", t] for u in range(5) for t in range(4)]  # too short to tell
        rows = [row[: len(header)] for row in log]
        (tmp_path / "log.csv").write_text(csv(rows, header))
        return run(tmp_path, ["log.csv"], [])

    with pytest.raises(UserError, match=r"1 of 99 users with 5 or more .* such as u7 and againu7"):
        converted(98, {"u7"})
    assert not (tmp_path / "out").exists()
    assert converted(99, {"u7"}).users == 105
    # Another item, or another time where there are times, and it is somebody else.
    others = [lambda row: [row[0], "other" if row[2] == 3 else row[1], row[2]]]
    others += [lambda row: [*row[:2], row[2] + (row[2] == 5)]] * timed
    for change in others:
        assert converted(9, {"u7"}, change).users == 15


def test_a_log_alone_in_its_own_order(tmp_path):
    (tmp_path / "log.csv").write_text(csv([row[:2] for row in LOG], ["user_id", "item_id"]))
    run(tmp_path, ["log.csv"], [])
    assert histories(tmp_path / "out")["ann"] == ["lamp", "rug", "desk"]
    assert "timestamps" not in pq.read_table(tmp_path / "out" / "histories.parquet").column_names


@pytest.mark.parametrize("kind", ["csv", "recbole"])
def test_ids_of_digits_are_text(tmp_path, kind):
    """007 is not 7, and is the 007 of a catalogue that says it as text."""
    log = [("01", "007", 1), ("01", "7", 2), ("1", "0042", 3), ("1", "007", 4)]
    header, separator = ["user_id", "item_id", "timestamp"], ","
    if kind == "recbole":
        header, separator = ["user_id:token", "item_id:token", "timestamp:float"], "\t"
        (tmp_path / "x").mkdir()
        (tmp_path / "x" / "x.item").write_text("item_id:token\ttitle:token_seq\n007\tBond\n")
    file = tmp_path / ("x/x.inter" if kind == "recbole" else "log.csv")
    file.write_text(csv(log, header, separator))
    pq.write_table(pa.table({"item_id": ["007"], "title": ["Bond"]}), tmp_path / "items.parquet")
    paths = ["x"] if kind == "recbole" else ["items.parquet", "log.csv"]
    run(tmp_path, paths, ["source=recbole"] if kind == "recbole" else [])
    assert histories(tmp_path / "out") == {"01": ["007", "7"], "1": ["0042", "007"]}
    titles, keys = read_titles(tmp_path / "out")
    assert dict(zip(keys, titles, strict=True))["007"] == "Bond" and len(keys) == 3


def test_integers_that_were_written_as_fractions_are_integers(tmp_path):
    """As pandas does where one of them is missing elsewhere."""
    (tmp_path / "log.csv").write_text("user_id,item_id\n3.0,10\n3.0,11\n")
    (tmp_path / "items.csv").write_text("item_id,title\n10.0,Ten\n11.0,Eleven\n")
    run(tmp_path, ["items.csv", "log.csv"], [])
    assert histories(tmp_path / "out") == {"3": ["10", "11"]}
    assert read_titles(tmp_path / "out")[0] == ["Ten", "Eleven"]


def test_times_to_the_nanosecond(tmp_path):
    times = pa.array([2_000_000_000_000_000_777, 1_000_000_000_000_000_999], pa.timestamp("ns"))
    log = {"user_id": ["ann", "ann"], "item_id": ["rug", "lamp"], "timestamp": times}
    pq.write_table(pa.table(log), tmp_path / "log.parquet")
    run(tmp_path, ["log.parquet"], [])
    assert histories(tmp_path / "out") == {"ann": ["lamp", "rug"]}


def test_marks_that_recbole_does_not_quote_with_are_part_of_titles(tmp_path):
    (tmp_path / "x").mkdir()
    titles = {"rug": '"Unfinished', "lamp": "Red", "desk": '"Oak" desk'}
    for name, rows, header in (
        ("inter", [row[:2] for row in LOG], ["user_id:token", "item_id:token"]),
        ("item", titles.items(), ["item_id:token", "title:token_seq"]),
    ):
        (tmp_path / "x" / f"x.{name}").write_text(csv(rows, header, "\t"))
    run(tmp_path, ["x"], ["source=recbole"])
    found = dict(zip(*read_titles(tmp_path / "out")[::-1], strict=True))
    assert {item: found[item] for item in titles} == titles


def test_half_a_character_in_json_is_replaced(tmp_path):
    (tmp_path / "meta.jsonl").write_text('{"parent_asin": "a", "title": "Up \\ud83d"}\n')
    review = '{"parent_asin": "a", "user_id": "u", "timestamp": 1}\n'
    (tmp_path / "reviews.jsonl").write_text(review)
    run(tmp_path, ["meta.jsonl", "reviews.jsonl"], ["source=amazon_reviews"])
    assert read_titles(tmp_path / "out")[0] == ["Up ?"]


@pytest.mark.parametrize("separator", ["::", ","])
def test_movielens(tmp_path, separator):
    movies = [(7, "Amélie, the film (2001)", "Drama"), (9, "Up", "Comedy")]
    ratings = [(1, 9, 5, 20), (1, 7, 3, 10), (2, 7, 1, 5), (2, 9, 4, 9)]
    for name, rows, header in (
        ("movies", movies, ["movieId", "title", "genres"]),
        ("ratings", ratings, ["userId", "movieId", "rating", "timestamp"]),
    ):
        if separator == "::":
            text = "".join("::".join(map(str, row)) + "\n" for row in rows)
            (tmp_path / f"{name}.dat").write_text(text, encoding="latin-1")
        else:
            (tmp_path / f"{name}.csv").write_text(csv(rows, header))
    out = tmp_path / "data"
    prefixmem(
        "data", "convert", tmp_path, "source=movielens", "source.least_rating=2", "--out", out
    )
    assert histories(out) == {"1": ["7", "9"], "2": ["9"]}
    assert read_titles(out)[0] == ["Amélie, the film (2001)", "Up"]


def text(name, content):
    return lambda folder: (folder / name).write_text(content)


def nothing(folder):
    pass


TWO = csv(LOG, ["user_id", "item_id", "timestamp"])


@pytest.mark.parametrize(
    "paths, write, overrides, words",
    [
        (["log.csv"], nothing, [], "log.csv: no such file or folder"),
        ([], nothing, [], "no files are named"),
        (["a.csv", "a.csv", "a.csv"], text("a.csv", TWO), [], "expected ITEMS INTERACTIONS"),
        (["log.csv"], text("log.csv", ""), [], "log.csv: not readable"),
        (["log.csv"], text("log.csv", "user_id,item_id\n"), [], "log.csv: the file has no rows"),
        (["log.csv"], text("log.csv", "a,b\n1\n"), [], "log.csv: not readable"),
        (["log.xls"], text("log.xls", TWO), [], "ends in .csv, .tsv, .jsonl or .parquet"),
        (["log.csv"], text("log.csv", "a,b\n1,2\n"), [], "no column like 'user_id'; the file has: a, b; set source.user=NAME"),
        (["log.csv"], text("log.csv", "uid,b\n1,2\n"), [], "no column like 'item_id'"),
        (["log.csv"], text("log.csv", TWO), ["source.user=who"], "no column 'who'; the file has: user_id"),
        (["log.csv"], text("log.csv", TWO), ["source.time=when"], "no column 'when'"),
        (["log.csv"], text("log.csv", "user_id,item_id,timestamp\na,b,soon\n"), [], "column 'timestamp': "),
        (["log.csv"], text("log.csv", "user_id,item_id,timestamp\na,b,1\na,c,\n"), [], "row 1: timestamp is missing"),
        (["log.csv"], text("log.csv", "user_id,item_id,timestamp\na,b,nan\na,c,1.5\n"), [], "timestamp is nan|timestamp is missing"),
        (["log.csv"], text("log.csv", "user_id,item_id,timestamp\na,b,1.7e15\na,c,0.5\n"), [], "row 0: timestamp is 17000000"),
        (["log.csv"], text("log.csv", "user_id,item_id\n1,b\n,c\n"), [], "row 1: user_id is empty"),
        (["log.csv"], text("log.csv", "user_id,item_id\na,b\n,c\n"), [], "row 1: user_id is empty"),
        (["log.jsonl"], text("log.jsonl", '{"user_id": 1.5, "item_id": "b"}\n'), [], "column 'user_id' has numbers that are no ids"),
        (["log.jsonl"], text("log.jsonl", '{"user_id": true, "item_id": "b"}\n'), [], "column 'user_id' is bool, expected ids"),
        (["log.jsonl"], text("log.jsonl", "{\"user_id\": 1}\n{"), [], "log.jsonl: not readable"),
        (["log.jsonl"], text("log.jsonl", '{"user_id": [1], "item_id": 2}\n'), [], "column 'user_id' is list"),
        (["log.parquet"], text("log.parquet", "no"), [], "log.parquet: not readable"),
        (["log.csv.gz"], text("log.csv.gz", TWO), [], "log.csv.gz: not readable"),
        (["i.csv", "log.csv"], lambda f: (text("log.csv", TWO)(f), text("i.csv", "item_id,title\nrug,a\nrug,b\n")(f)), [], "item rug is in the catalogue twice"),
        (["i.csv", "log.csv"], lambda f: (text("log.csv", TWO)(f), text("i.csv", "label\nrug\n")(f)), [], "i.csv: no column like 'item_id'"),
        (["i.tsv", "log.csv"], lambda f: (text("log.csv", TWO)(f), text("i.tsv", 'item_id\ttitle\ncup\tBlue\nrug\t"Unfinished\ndesk\tOak\nlamp\t"Red" lamp\n')(f)), [], "i.tsv: row 1: title goes over several lines"),
        (["i.csv", "log.csv"], lambda f: (text("log.csv", TWO)(f), (f / "i.csv").write_bytes(b"item_id,title\nrug,Am\xe9lie\n")), [], "i.csv: column 'title' is no UTF-8 text"),
        (["i.csv", "log.csv"], lambda f: (text("log.csv", TWO)(f), text("i.csv", "item_id\nRUG\nLAMP\n")(f)), [], "none of its items is in the catalogue, which has RUG where it has lamp"),
        (["log.csv"], text("log.csv", "id,user_id,sku\n1,a,x\n2,a,y\n"), [], "no column like 'item_id'; the file has: id, user_id, sku; set source.item=NAME"),
        (["log.parquet"], lambda f: pq.write_table(pa.table({"user_id": ["a"], "item_id": ["b"], "time": pa.array([2**63], pa.uint64())}), f / "log.parquet"), [], "column 'time': "),
        (["log.csv"], text("log.csv", TWO), ["source=spreadsheet"], "no kind 'spreadsheet'"),
        (["log.csv"], text("log.csv", TWO), ["k_core=-1"], "k_core: expected"),
        (["log.csv"], text("log.csv", TWO), ["source.usr=a"], "did you mean source.user"),
        (["log.csv"], text("log.csv", TWO), ["source=movielens"], "expected a folder with ratings.csv"),
        (["x"], lambda f: (f / "x").mkdir(), ["source=movielens"], "ratings.csv: not readable"),
        (["x"], lambda f: ((f / "x").mkdir(), text("x/ratings.dat", "1::2::3\n")(f)), ["source=movielens"], "ratings.dat: line 1: 3 fields, expected 4"),
        (["x"], lambda f: ((f / "x").mkdir(), text("x/ratings.dat", "1::2::3::now\n")(f)), ["source=movielens"], "column 'timestamp' must hold integers"),
        (["x"], lambda f: ((f / "x").mkdir(), text("x/ratings.csv", "a\n1\n")(f), text("x/movies.csv", "a\n1\n")(f)), ["source=movielens"], "no column 'userId', which MovieLens has"),
        (["x"], lambda f: ((f / "x").mkdir(), text("x/ratings.dat", "1::2::3::4\n")(f), text("x/movies.dat", "2::Up::Drama\n")(f)), ["source=movielens", "source.least_rating=6", "k_core=5"], "no interactions are left"),
        (["x"], lambda f: (f / "x").mkdir(), ["source=recbole"], "0 files end in .inter, expected one"),
        (["x"], lambda f: ((f / "x").mkdir(), text("x/a.inter", "user:token\titem_id:token\n1\t2\n")(f)), ["source=recbole"], "no column 'user_id'"),
        (["x"], lambda f: (f / "x").mkdir(), ["source=lc_rec"], "0 files end in .inter.json"),
        (["x"], lambda f: ((f / "x").mkdir(), text("x/a.inter.json", "[]")(f)), ["source=lc_rec"], "expected a JSON object"),
        (["x"], lambda f: ((f / "x").mkdir(), text("x/a.inter.json", "{}")(f)), ["source=lc_rec"], "no users"),
        (["x"], lambda f: ((f / "x").mkdir(), text("x/a.inter.json", '{"u": 3}')(f)), ["source=lc_rec"], "user u: expected a list of items"),
        (["x"], lambda f: ((f / "x").mkdir(), text("x/a.inter.json", '{"u": [3]}')(f), text("x/a.index.json", '{"3": ["a7"]}')(f)), ["source=lc_rec"], "item 3: expected tokens such as <a_17>"),
        (["x"], lambda f: ((f / "x").mkdir(), text("x/a.inter.json", '{"u": [3]}')(f), text("x/a.index.json", "{}")(f)), ["source=lc_rec"], "item 3: expected tokens such as <a_17>, got None"),
        (["r.jsonl"], text("r.jsonl", "[1]\n"), ["source=amazon_reviews"], "r.jsonl: line 1: not a JSON object"),
        (["r.jsonl"], text("r.jsonl", "{'asin': f()}\n"), ["source=amazon_reviews"], "r.jsonl: line 1: not a JSON object"),
        (["r.jsonl"], text("r.jsonl", '{"asin": "a", "timestamp": 1}\n'), ["source=amazon_reviews"], "line 1: no user_id or reviewerID"),
        (["r.jsonl"], text("r.jsonl", '{"asin": "a", "user_id": "u"}\n'), ["source=amazon_reviews"], "line 1: no timestamp or unixReviewTime"),
        (["r.jsonl"], text("r.jsonl", '{"asin": "a", "user_id": "u", "timestamp": 1, "rating": "5"}\n'), ["source=amazon_reviews"], "rating is '5', expected a number"),
        (["r.json.gz"], text("r.json.gz", "{}"), ["source=amazon_reviews"], "r.json.gz: not readable"),
        (["r.json.gz"], lambda f: (f / "r.json.gz").write_bytes(gzip.compress(b"{}\n" * 999)[:12] + b"\xff" * 40), ["source=amazon_reviews"], "r.json.gz: not readable"),
        (["r.jsonl"], text("r.jsonl", "\n"), ["source=amazon_reviews"], "r.jsonl: no reviews"),
        (["r.jsonl"] * 3, text("r.jsonl", "\n"), ["source=amazon_reviews"], "expected METADATA REVIEWS"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_told_and_nothing_is_left(tmp_path, paths, write, overrides, words):
    write(tmp_path)
    with pytest.raises(UserError, match=words) as error:
        run(tmp_path, paths, overrides)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()
