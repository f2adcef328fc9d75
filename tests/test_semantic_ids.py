"""The vocabulary, the catalogue and the trie, against plain loops."""

import json

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prefixmem_jax.errors import UserError
from prefixmem_jax.semantic_ids.catalog import Catalog
from prefixmem_jax.semantic_ids.space import SidSpace
from prefixmem_jax.semantic_ids.trie import Trie
from prefixmem_jax.semantic_ids.vocabulary import Vocabulary

SPACE = SidSpace((3, 5, 2, 4))
VOCABULARY = Vocabulary(SPACE)


def prefix_at(tokens: list[int], segments: list[int], at: int) -> list[int]:
    """The prefix that position `at` is in, read off by hand: codes, or [] where there is none."""
    for level in range(1, SPACE.levels + 1):
        start, stop = VOCABULARY.token_range(level)
        if start <= tokens[at] < stop and segments[at] > 0:
            codes = []
            for j in range(1, level + 1):
                where = at - level + j
                first, last = VOCABULARY.token_range(j)
                if where < 0 or segments[where] != segments[at]:
                    return []
                if not first <= tokens[where] < last:
                    return []
                codes.append(tokens[where] - first)
            return codes
    return []


def test_tokens_and_codes_are_inverse_with_uneven_codebooks():
    rng = np.random.default_rng(0)
    codes = np.stack([rng.integers(0, size, 50) for size in SPACE.codebook_sizes], axis=1)
    vocabulary = Vocabulary(SPACE, text_tokens=11)
    tokens = vocabulary.encode(codes)
    assert tokens.dtype == np.int32
    assert np.array_equal(vocabulary.decode(tokens), codes)
    level, code = vocabulary.level_and_code(tokens)
    assert np.array_equal(code, codes) and np.array_equal(level, [[1, 2, 3, 4]] * 50)
    for level in range(1, 5):
        start, stop = vocabulary.token_range(level)
        assert ((tokens[:, level - 1] >= start) & (tokens[:, level - 1] < stop)).all()
        prefixes = jax.jit(vocabulary.encode_prefix)(codes[:, :level])
        assert np.array_equal(prefixes, tokens[:, :level])


def test_every_token_of_a_vocabulary_is_one_thing():
    plain, filled = Vocabulary(SPACE, 11), Vocabulary(SPACE, 11, multiple=16)
    assert plain.size == plain.used == filled.used == 11 + 2 + 14 and filled.size == 32
    assert Vocabulary(SPACE, 13, multiple=29).size == 29  # full already
    for vocabulary in (plain, filled):
        tokens = np.arange(-1, vocabulary.size)
        text = vocabulary.is_text(tokens)
        special = np.isin(tokens, [vocabulary.pad_token, vocabulary.bos_token])
        level = np.asarray(vocabulary.level_and_code(tokens)[0])
        assert tokens[text].tolist() == list(range(11)) and special.sum() == 2
        assert np.bincount(level[level > 0]).tolist() == [0, 3, 5, 2, 4]
        kinds = text.astype(int) + special + (level > 0)
        assert kinds.tolist() == [0] + [1] * 27 + [0] * (vocabulary.size - 27)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_prefixes_count_only_contiguous_codes_of_one_item_in_one_document(data):
    # Mostly true SIDs, cut up by stray tokens and document borders.
    tokens, segments, segment = [], [], 1
    while len(tokens) < 24:
        kind = data.draw(st.integers(0, 5))
        if kind <= 3:
            codes = [data.draw(st.integers(0, size - 1)) for size in SPACE.codebook_sizes]
            piece = VOCABULARY.encode(np.array(codes)).tolist()
            piece = piece[: data.draw(st.integers(1, 4))]
        else:
            piece = [data.draw(st.integers(0, VOCABULARY.size - 1))]
        segment += kind == 5
        tokens += piece
        segments += [segment] * len(piece)
    tokens, segments = tokens[:24], segments[:24]
    segments[22:] = [0, 0]
    level, codes = VOCABULARY.prefixes(np.array([tokens]), np.array([segments]))
    for at in range(24):
        expected = prefix_at(tokens, segments, at)
        assert int(level[0, at]) == len(expected)
        assert codes[0, at].tolist() == expected + [0] * (4 - len(expected))


def random_catalog(rng: np.random.Generator, items: int, sizes=(3, 5, 2, 4)) -> Catalog:
    sids = np.stack([rng.integers(0, size, items) for size in sizes], axis=1)
    return Catalog(sids, [None] * items, SidSpace(sizes))


def item_line(item: int, sid: object, title: object = None) -> str:
    return json.dumps({"item": item, "sid": sid, "title": title}) + "\n"


def test_exported_items_read_the_same(tmp_path):
    path = tmp_path / "items.jsonl"
    path.write_text(item_line(0, [1, 4], "ä") + item_line(1, [0, 2]) + item_line(2, [1, 4]))
    catalog = Catalog.read_jsonl(path)
    assert catalog.sids.tolist() == [[1, 4], [0, 2], [1, 4]]
    assert catalog.titles == ["ä", None, None]
    assert catalog.space.codebook_sizes == (2, 5)
    assert Catalog.read_jsonl(path, (9, 9)).space.codebook_sizes == (9, 9)


@pytest.mark.parametrize(
    "text, words",
    [
        (item_line(0, [1, 2]) + item_line(2, [1, 2]), "line 2: item is 2, expected 1"),  # missing
        (item_line(0, [1, 2]) * 2, "line 2: item is 0, expected 1"),
        (item_line(True, [1, 2]), "line 1: item is true, expected 0"),
        ('{"sid": [1, 2]}\n', "line 1: item is null, expected 0"),
        (item_line(0, [1, 2]) + item_line(1, [1]), "line 2: sid has 1 codes"),
        (item_line(0, [1, 2, 3]), "line 1: sid has 3 codes, expected 2"),
        (item_line(0, []), "line 1: sid is [], expected a list of integers"),
        (item_line(0, [1, 2.0]), "line 1: sid is [1, 2.0], expected a list of integers"),
        (item_line(0, "12"), 'line 1: sid is "12", expected a list of integers'),
        (item_line(0, [1, -2]), "line 1: sid level 2 is -2, expected 0..7"),
        (item_line(0, [1, 8]), "line 1: sid level 2 is 8, expected 0..7"),
        (item_line(0, [1, 2], 3), "line 1: title is 3, expected a string or null"),
        (item_line(0, [1, 2]) + "\n", "line 2: not a JSON object"),
        (item_line(0, [1, 2])[:-9], "line 1: not a JSON object"),
        ("[0]\n", "line 1: not a JSON object"),
        (b"\x80\n", "line 1: not a JSON object"),
        ("[" * 100_000, "line 1: not a JSON object"),
        ("", "no items"),
    ],
)
def test_malformed_items_are_refused_in_one_line(tmp_path, text, words):
    path = tmp_path / "items.jsonl"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError) as error:
        Catalog.read_jsonl(path, (8, 8))
    assert str(error.value).startswith(f"{path}: {words}") and "\n" not in str(error.value)


def test_ragged_and_absent_items_are_refused_without_codebooks(tmp_path):
    path = tmp_path / "items.jsonl"
    with pytest.raises(UserError, match="not readable"):
        Catalog.read_jsonl(path)
    path.write_text(item_line(0, [1, 2]) + item_line(1, [1]))
    with pytest.raises(UserError, match="line 2: sid has 1 codes, line 1 has 2"):
        Catalog.read_jsonl(path)
    path.write_text(item_line(0, [1, 1 << 40]))
    with pytest.raises(UserError, match="sid level 2 is 1099511627776"):
        Catalog.read_jsonl(path)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10_000), items=st.integers(1, 60))
def test_groups_hold_exactly_the_items_of_each_sid(seed, items):
    catalog = random_catalog(np.random.default_rng(seed), items)
    by_sid: dict[tuple, list[int]] = {}
    for item, sid in enumerate(catalog.sids.tolist()):
        by_sid.setdefault(tuple(sid), []).append(item)
    assert len(catalog.group_sids) == len(by_sid) == len(catalog.group_sizes)
    for sid, members in by_sid.items():
        group = int(catalog.groups(np.array([sid]))[0])
        assert catalog.items_of_group(group).tolist() == members
        assert catalog.group_sizes[group] == len(members)
        assert {int(catalog.group_of_item[item]) for item in members} == {group}
    missing = next((s for s in np.ndindex(3, 5, 2, 4) if s not in by_sid), None)
    assert missing is None or catalog.groups(np.array([missing]))[0] == -1


@settings(max_examples=6, deadline=None)
@given(seed=st.integers(0, 10_000), items=st.integers(1, 60))
def test_trie_spells_exactly_the_catalogue_in_group_order(seed, items):
    catalog = random_catalog(np.random.default_rng(seed), items)
    spelled = []

    def walk(node: int, prefix: tuple) -> None:
        if len(prefix) == catalog.space.levels:
            spelled.append((node, prefix))
            return
        codes, children, valid = (
            np.asarray(x) for x in catalog.trie.levels[len(prefix)].children(np.array([node]))
        )
        for code, child in zip(codes[0][valid[0]], children[0][valid[0]], strict=True):
            walk(int(child), (*prefix, int(code)))

    walk(0, ())
    expected = [(group, tuple(sid)) for group, sid in enumerate(catalog.group_sids.tolist())]
    assert spelled == expected


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10_000), before=st.integers(1, 40), more=st.integers(1, 20))
def test_adding_and_removing_items_is_building_anew(seed, before, more):
    rng = np.random.default_rng(seed)
    sizes = [(3, 5, 2, 4), (70_000, 2), (2**31 - 1, 2**31 - 1, 3)][seed % 3]
    old, new = (
        np.stack([rng.integers(0, min(size, 4), n) for size in sizes], axis=1)
        for n in (before, more)
    )
    trie, both = (
        Trie(old, sizes),
        Trie(np.concatenate([old, new])[rng.permutation(before + more)], sizes),
    )
    assert trie.added(new).checksum == both.checksum != trie.checksum
    assert both.removed(new).checksum == trie.checksum
    for one, other in zip(trie.added(new).levels, both.levels, strict=True):
        np.testing.assert_array_equal(one.first_child, other.first_child)
        np.testing.assert_array_equal(one.code, other.code)
    counted = {tuple(sid): 0 for sid in old.tolist()}
    for sid in old.tolist():
        counted[tuple(sid)] += 1
    assert dict(zip(map(tuple, trie.sids.tolist()), trie.counts.tolist(), strict=True)) == counted
    assert trie.find(trie.sids).tolist() == list(range(len(trie)))
    prefixes = {tuple(sid[:n]) for sid in old.tolist() for n in range(1, len(sizes) + 1)}
    depths = trie.depths(new)
    for sid, depth in zip(new.tolist(), depths, strict=True):
        assert depth == max(
            [n for n in range(1, len(sizes) + 1) if tuple(sid[:n]) in prefixes], default=0
        )


def test_removing_what_is_not_there_is_refused():
    trie = Trie(np.array([[0, 1], [0, 1], [2, 0]]), (3, 2))
    assert trie.removed(np.array([[0, 1]])).counts.tolist() == [1, 1]
    with pytest.raises(UserError, match="SID 2-0 does not have as many items"):
        trie.removed(np.array([[2, 0], [2, 0]]))
    with pytest.raises(UserError, match="SID 1-1 does not have as many items"):
        trie.removed(np.array([[1, 1]]))
    with pytest.raises(UserError, match="every item would be removed"):
        trie.removed(np.array([[0, 1], [0, 1], [2, 0]]))
    with pytest.raises(UserError, match="a code outside its codebook"):
        Trie(np.array([[3, 0]]), (3, 2))


def test_a_million_sids_are_small():
    rng = np.random.default_rng(0)
    trie = Trie(rng.integers(0, 2048, (1_000_000, 5)), (2048,) * 5)
    assert len(trie) > 990_000 and trie.nbytes < 30e6
