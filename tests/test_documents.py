"""Documents with titles: what each kind says, in what shares, and that training on them teaches."""

import collections
import dataclasses
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import prefixmem
from transformers import AutoTokenizer

from prefixmem_jax.config import Config
from prefixmem_jax.config_files import to_json
from prefixmem_jax.config_groups import (
    CheckpointConfig,
    DataConfig,
    DecoderConfig,
    EvaluationConfig,
    OptimizerConfig,
    SyntheticConfig,
)
from prefixmem_jax.data.documents.catalogue import Catalogue
from prefixmem_jax.data.documents.document import Corpus, mixture
from prefixmem_jax.data.documents.interleaved import Interleaved
from prefixmem_jax.data.documents.items import Items
from prefixmem_jax.data.documents.next_item import NextItem
from prefixmem_jax.data.documents.pair import Pair
from prefixmem_jax.data.formats.parquet import write_dataset
from prefixmem_jax.data.packing import pack
from prefixmem_jax.data.prepare import prepare_data
from prefixmem_jax.data.synthetic import make_synthetic
from prefixmem_jax.data.texts import read_tokenizer, train_tokenizer, write_tokenizer
from prefixmem_jax.errors import UserError
from prefixmem_jax.evaluation.sid_to_text import title_bleu
from prefixmem_jax.objectives.next_token import NextToken
from prefixmem_jax.runs.run import Run
from prefixmem_jax.semantic_ids.catalog import Catalog
from prefixmem_jax.sid_encoders.prefix_memory import PrefixMemoryConfig
from prefixmem_jax.training.loop import train

COLOURS = ("red", "green", "blue", "black", "white", "grey")
THINGS = ("soap", "scent", "balm", "cream", "towel", "brush", "comb", "mirror")


def title_of(sid) -> str | None:
    """What the codes say, so that it can be learnt from them; some items have none."""
    first, second, third = (int(code) for code in sid)
    return None if (first, second) == (3, 5) else f"{COLOURS[first]} {THINGS[second]} No {third}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A dataset with titles, and beside it a tokenizer trained on them by the command."""
    folder = tmp_path_factory.mktemp("titles")
    sizes = SyntheticConfig(items=120, users=150, codebook_sizes=(6, 8, 9), children=(6, 5, 4))
    dataset, _ = make_synthetic(sizes)
    catalog = dataset.catalog
    titles = [title_of(sid) for sid in catalog.sids]
    catalog = Catalog(catalog.sids, titles, catalog.space)
    write_dataset(folder / "data", dataclasses.replace(dataset, catalog=catalog))
    said = prefixmem(
        "data", "tokenizer", folder / "data", "--tokens", 300, "--out", folder / "tokenizer"
    ).stdout
    assert "data.text_tokens=300" in said
    return folder


@pytest.fixture(scope="module")
def options(folder) -> DataConfig:
    return DataConfig(
        path=str(folder / "data"),
        tokenizer=str(folder / "tokenizer"),
        text_tokens=300,
        max_items=5,
        sequence_length=80,
        batch_size=8,
    )


@pytest.fixture(scope="module")
def corpus(options) -> Corpus:
    return Corpus(prepare_data(options), options)


def read(corpus, documents) -> list[tuple[str, str, tuple[int, ...]]]:
    """Of every document: what it says, what of it is predicted, and which items are guessed."""
    vocabulary = corpus.data.vocabulary
    tokenizer, end = read_tokenizer(corpus.config.tokenizer)

    levels, codes = (np.asarray(x) for x in vocabulary.level_and_code(documents.tokens))

    def spelt(at: np.ndarray) -> str:
        said, text = "", []
        for token, level, code in zip(
            [*documents.tokens[at], -1], [*levels[at], 0], [*codes[at], 0], strict=True
        ):
            if 0 <= token < vocabulary.text_tokens and token != end:
                text.append(token)
                continue
            said, text = said + tokenizer.decode(text, skip_special_tokens=False), []
            if level:
                said += f"<{level}:{code}>"
            elif token == end:
                said += "."
            elif token == vocabulary.bos_token:
                said += "^"
        return said

    found = []
    for start, stop in zip(documents.offsets[:-1], documents.offsets[1:], strict=True):
        at, mask = np.arange(start, stop), documents.loss_mask[start:stop]
        guessed = documents.next_item[start:stop]
        starts_item = np.append(levels[start + 1 : stop] == 1, False)
        assert not guessed[~starts_item].any()
        assert mask[-1] == 0
        found.append((spelt(at), spelt(at[1:][mask[:-1] > 0]), tuple(guessed[guessed > 0] - 1)))
    return found


def sid_text(corpus, item) -> str:
    return "".join(f"<{i}:{code}>" for i, code in enumerate(corpus.data.catalog.sids[item], 1))


def title(corpus, item) -> str:
    return corpus.data.catalog.titles[item] or ""


def windows_of(corpus, most) -> list[np.ndarray]:
    """Training sequences cut from the back."""
    split, found = corpus.data.split, []
    for start, stop in zip(split.train.starts, split.train.stops, strict=True):
        items = split.items[start:stop]
        while len(items):
            found.append(items[-most:])
            items = items[:-most]
    return found


def documents_of(kind, corpus):
    return kind.documents(corpus, np.random.default_rng(0))


@pytest.mark.parametrize("predicted", ["everything", "sids", "text"])
@pytest.mark.parametrize("sid_first", [0.0, 1.0])
def test_interleaved_says_title_and_sid_of_every_item(corpus, sid_first, predicted):
    longest = 3 + int(corpus.texts.lengths.max())
    most = min(5, (80 - 1) // longest)
    expected = []
    for items in windows_of(corpus, most):
        parts = [(title(corpus, i), sid_text(corpus, i)) for i in items]
        said = "".join(sid + text if sid_first else text + sid for text, sid in parts)
        learnt = {
            "everything": said,
            "sids": "".join(sid for _, sid in parts),
            "text": "".join(text for text, _ in parts),
        }[predicted]
        expected.append(("^" + said, learnt, tuple(items) if sid_first else ()))
    documents = documents_of(Interleaved(sid_first=sid_first, predicted=predicted), corpus)
    assert read(corpus, documents) == expected


def test_drawn_subsequences_end_at_any_item_and_hold_what_fits_before_it(corpus):
    split, kind = corpus.data.split, Items(draws=500)
    ranges = kind.ranges(corpus, corpus.data.vocabulary.levels, np.random.default_rng(0))
    drawn = list(zip(ranges.starts.tolist(), ranges.stops.tolist(), strict=True))
    sequences = list(zip(split.train.starts.tolist(), split.train.stops.tolist(), strict=True))
    assert len(drawn) == 500 * len(sequences)
    for number, (start, stop) in enumerate(sequences):
        found = collections.Counter(drawn[500 * number : 500 * (number + 1)])
        ends = range(min(start + 2, stop), stop + 1)
        assert set(found) == {(max(start, end - 5), end) for end in ends}
        expected = 500 / len(ends)
        assert max(abs(count - expected) for count in found.values()) < 5 * expected**0.5
    documents = documents_of(kind, corpus)  # of the same draws
    for number in (0, 499, 500, 20_000):
        (said, predicted, _), start_stop = read(corpus, documents.take([number]))[0], drawn[number]
        items = split.items[slice(*start_stop)]
        assert said == "^" + "".join(sid_text(corpus, item) for item in items)
        assert predicted == said[1:]


def test_next_items_are_drawn_behind_as_much_history_as_validation_has(corpus):
    split = corpus.data.split
    longer = dataclasses.replace(corpus, config=dataclasses.replace(corpus.config, max_items=3))
    found = read(longer, documents_of(NextItem(draws=200), longer))
    expected = set()
    for start, stop in zip(split.train.starts, split.train.stops, strict=True):
        for at in range(start + 1, stop):
            items = split.items[max(start, at - 3) : at + 1]
            said = "^" + "".join(sid_text(corpus, item) for item in items)
            expected.add((said, sid_text(corpus, items[-1])))
    assert {(said, predicted) for said, predicted, _ in found} == expected
    assert len(found) == 200 * (split.train.lengths > 1).sum()


def test_the_catalogue_has_every_item_once_and_counts_for_less(corpus):
    documents = documents_of(Catalogue(loss_weight=0.25), corpus)
    items = range(len(corpus.data.catalog))
    assert read(corpus, documents) == [
        ("^" + sid_text(corpus, item), sid_text(corpus, item).partition(">")[2], ())
        for item in items
    ]
    assert set(documents.loss_mask.tolist()) == {0.0, 0.25}
    halves = [dataclasses.replace(corpus, part=part, parts=2) for part in (0, 1)]
    said = [read(half, documents_of(Catalogue(), half)) for half in halves]
    assert sorted(said[0] + said[1]) == sorted(read(corpus, documents))


@pytest.mark.parametrize(
    "kind", [Items(), Items(draws=3), NextItem(), Catalogue(), Interleaved(), Pair()]
)
def test_no_document_is_longer_than_its_kind_says(kind, corpus):
    """Attention looks no further back on TPUs."""
    longest = kind.longest(corpus.config, corpus.data.vocabulary.levels)
    assert documents_of(kind, corpus).lengths.max() <= longest <= corpus.config.sequence_length


def test_interleaved_is_either_way_round(corpus):
    found = read(corpus, documents_of(Interleaved(sid_first=0.3), corpus))
    titled = [said for said, _, _ in found if " No " in said]
    assert 0.2 < np.mean([said.startswith("^<") for said in titled]) < 0.45


def test_pairs_say_every_titled_item_by_each_template(corpus):
    templates = ("{title}{sid}", "{sid} is called {title}")
    found = read(corpus, documents_of(Pair(templates=templates, predicted="text"), corpus))
    titled = [item for item in range(120) if title(corpus, item)]
    assert len(titled) == 115
    expected = [
        (f"^{title(corpus, i)}{sid_text(corpus, i)}", title(corpus, i), ()) for i in titled
    ] + [
        (f"^{sid_text(corpus, i)} is called {title(corpus, i)}.", f"{title(corpus, i)}.", ())
        for i in titled
    ]
    assert found == expected
    either = read(corpus, documents_of(Pair(), corpus))
    assert either[-1] == (
        f"^{sid_text(corpus, titled[-1])}{title(corpus, titled[-1])}.",
        f"{sid_text(corpus, titled[-1])}{title(corpus, titled[-1])}.",
        (),
    )


def test_a_chat_template_is_written_with_the_tokenizers_own_marks(options, tmp_path):
    """As an instruct model's: its marks are one token each, and its turn ends with its own end."""
    tokenizer = train_tokenizer(["red soap", "blue balm No 3"], 290)
    tokenizer.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    write_tokenizer(tokenizer, tmp_path)
    described = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({**described, "eos_token": "<|im_end|>"})
    )
    start, end = map(tokenizer.token_to_id, ("<|im_start|>", "<|im_end|>"))
    asked = "<|im_start|>user\nWhat is {sid}?<|im_end|>\n<|im_start|>assistant\n{title}"
    corpus = Corpus(prepare_data(options), dataclasses.replace(options, tokenizer=str(tmp_path)))
    documents = documents_of(Pair(templates=(asked,), predicted="text"), corpus)
    first = documents.take(np.arange(1))
    item = int(np.flatnonzero(corpus.texts.lengths)[0])
    expected = asked.format(sid=sid_text(corpus, item), title=title(corpus, item))
    said = [int(token) for token in first.tokens]
    assert (said.count(start), said.count(end), said[-1]) == (2, 2, end)
    ((spoken, predicted, _),) = read(corpus, first)
    assert spoken == "^" + expected.replace("<|im_end|>", ".") + "."
    assert predicted == title(corpus, item) + "."


def test_titles_are_cut_at_their_budget(folder, options):
    short = dataclasses.replace(options, text_length=2)
    corpus = Corpus(prepare_data(short), short)
    tokenizer, _ = read_tokenizer(folder / "tokenizer")
    for item, said in enumerate(corpus.data.catalog.titles):
        start, stop = corpus.texts.offsets[item : item + 2]
        assert corpus.texts.tokens[start:stop].tolist() == tokenizer.encode(said or "").ids[:2]


@pytest.mark.parametrize("weights", [(1.0, 1.0, 1.0), (1.0, 5.0, 2.0), (10.0, 0.5, 1.0)])
def test_kinds_are_there_as_often_as_their_weights_say(corpus, weights):
    interleaved, pair, items = weights
    kinds = [
        Interleaved(weight=interleaved, predicted="text"),
        Pair(weight=pair, templates=("{title} is {sid}", "{sid}: {title}")),
        Items(weight=items),
    ]
    pools = [read(corpus, documents_of(kind, corpus)) for kind in kinds]
    # Interleaving is drawn, so that its documents are not those of another drawing.
    pools[0] = [("interleaved",)]
    found = read(corpus, mixture(kinds, corpus, seed=3))
    known = [{document for document in pool} for pool in pools]
    counts = [collections.Counter(), collections.Counter(), collections.Counter()]
    for document in found:
        kind = next((k for k in (2, 1) if document in known[k]), 0)
        counts[kind][document] += 1
    totals = [counter.total() for counter in counts]
    shares = np.array(totals) / len(found)
    np.testing.assert_allclose(shares, np.array(weights) / sum(weights), atol=0.01)
    assert set(counts[1]) == known[1] and set(counts[2]) == known[2]
    there = collections.Counter(pools[1])
    times = totals[1] / len(pools[1])
    for document, count in counts[1].items():
        assert there[document] * int(times) <= count <= there[document] * np.ceil(times)


def test_packed_they_stay_apart_and_waste_little(corpus):
    documents = mixture([Interleaved(), Pair(), Items()], corpus, seed=0)
    batch = pack(documents, 80, seed=0)
    assert (batch.segment_ids == 0).mean() < 0.03
    begins = batch.tokens == corpus.data.vocabulary.bos_token
    assert begins.sum() == len(documents)
    np.testing.assert_array_equal(batch.positions[begins], 0)
    borders = np.diff(np.pad(batch.segment_ids, ((0, 0), (1, 0)))) != 0
    np.testing.assert_array_equal(begins, borders & (batch.segment_ids > 0))


def test_what_does_not_fit_is_one_line(corpus, options, folder, tmp_path):
    def refused(words, kind, **changes):
        changed = dataclasses.replace(options, **changes)
        with pytest.raises(UserError, match=words):
            mixture([kind], Corpus(corpus.data, changed), seed=0)

    refused("documents with text need data.tokenizer", Pair(), tokenizer=None)
    refused("has 300 tokens, data.text_tokens=299; expected 300 or more", Pair(), text_tokens=299)
    refused("no tokenizer there; expected tokenizer.json", Pair(), tokenizer=str(folder))
    refused("sequence_length=6 is too short: one item needs", Interleaved(), sequence_length=6)
    refused("too short: an item and the next one need 7 tokens", NextItem(), sequence_length=6)
    refused("sequence_length=3 is too short: one item needs 4", Catalogue(), sequence_length=3)
    refused("sequence_length=6 is too short: a title and its SID", Pair(), sequence_length=6)
    refused("'{title}': expected {title} and {sid}, each once", Pair(templates=("{title}",)))
    refused("expected {title} and {sid}", Pair(templates=("{sid}{sid}{title}",)))
    (tmp_path / "tokenizer.json").write_text("{}")
    refused("tokenizer.json: makes no tokenizer", Pair(), tokenizer=str(tmp_path))
    untitled = Catalog(corpus.data.catalog.sids, [None] * 120, corpus.data.catalog.space)
    bare = dataclasses.replace(
        corpus.data, dataset=dataclasses.replace(corpus.data.dataset, catalog=untitled)
    )
    with pytest.raises(UserError, match=r"objective.documents: .*pair finds nothing to say"):
        mixture([Items(), Pair()], Corpus(bare, options), seed=0)


def test_a_tokenizer_without_titles_or_place_is_refused(folder, tmp_path):
    dataset, _ = make_synthetic(SyntheticConfig(items=60, users=30))
    bare = Catalog(dataset.catalog.sids, [None] * 60, dataset.catalog.space)
    write_dataset(tmp_path / "bare", dataclasses.replace(dataset, catalog=bare))
    out = tmp_path / "tokenizer"
    said = prefixmem("data", "tokenizer", tmp_path / "bare", "--out", out, expect=2).stderr
    assert "no item has a title" in said and not out.exists()


def test_titles_need_no_sids_for_a_tokenizer(tmp_path):
    titles = ["red lamp", "blue lamp", "red cup"]
    (tmp_path / "raw").mkdir()
    table = pa.table({"item_id": range(3), "title": titles})
    pq.write_table(table, tmp_path / "raw" / "items.parquet")
    done = prefixmem(
        "data", "tokenizer", tmp_path / "raw", "--tokens", 300, "--out", tmp_path / "t"
    )
    assert "from 3 titles" in done.stdout and (tmp_path / "t" / "tokenizer.json").is_file()


def test_what_was_trained_goes_through_a_file(tmp_path):
    trained = train_tokenizer(["red soap", "blue soap, très cher \u20ac"] * 5, 280)
    write_tokenizer(trained, tmp_path)
    ours, end = read_tokenizer(tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    text = "très red\u20ac \U0001f600 soap"
    assert ours.encode(text).ids == theirs(text).input_ids == trained.encode(text).ids
    assert ours.decode(ours.encode(text).ids) == text
    assert end == theirs.eos_token_id


def run_config(options, steps) -> Config:
    return Config(
        "titles",
        objective=NextToken(documents=(Interleaved(), Pair(weight=2.0), Items())),
        steps=steps,
        data=options,
        model=DecoderConfig(layers=1, d_model=64, d_ff=128, query_heads=2, kv_heads=2, head_dim=32),
        sid_encoder=PrefixMemoryConfig(target_levels=(2, 3), orders=2, heads=2, rows=500, d_mem=16),
        optimizer=OptimizerConfig(learning_rate=1e-2, warmup_steps=10),
        checkpoint=CheckpointConfig(every_steps=20, keep=10),
        evaluation=EvaluationConfig(every_steps=160, users=20, beam=5),
    )


def test_titles_are_learnt_exported_and_guarded(folder, options, tmp_path, first_device_alone):
    """BLEU rises; an export speaks text and SIDs; with another tokenizer the run does not go on."""
    run = tmp_path / "run"
    train(run_config(options, 160), run)
    first, last = (title_bleu(Run(run, step).engine(), options.tokenizer) for step in (20, None))
    assert first < 40 < 60 < last

    prefixmem("export", run, "--out", tmp_path / "exported")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "exported", trust_remote_code=True)
    ours, _ = read_tokenizer(options.tokenizer)
    assert tokenizer("red soap").input_ids == ours.encode("red soap").ids

    other = tmp_path / "tokenizer"
    other.mkdir()
    write_tokenizer(train_tokenizer(["other words"] * 9, 290), other)
    changed = run_config(dataclasses.replace(options, tokenizer=str(other)), 170)
    saved = (run / "config.json").read_text()
    (run / "config.json").write_text(to_json(dataclasses.replace(changed, steps=160)))
    with pytest.raises(
        UserError, match="tokenizer holds something else than what it was trained with"
    ):
        train(changed, run)
    (run / "config.json").write_text(saved)
