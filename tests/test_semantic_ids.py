"""The space of codes, the catalogue and the trie, against plain loops."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from prefixmem_jax.semantic_ids.catalog import Catalog
from prefixmem_jax.semantic_ids.space import SidSpace
from prefixmem_jax.semantic_ids.trie import Trie

SPACE = SidSpace((3, 5, 2, 4))


def prefix_at(space: SidSpace, tokens: list[int], segments: list[int], at: int) -> list[int]:
    """The prefix that position `at` is in, read off by hand: codes, or [] where there is none."""
    for level in range(1, space.levels + 1):
        start, stop = space.token_range(level)
        if start <= tokens[at] < stop and segments[at] > 0:
            codes = []
            for j in range(1, level + 1):
                where = at - level + j
                first, last = space.token_range(j)
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
    tokens = SPACE.encode(codes)
    assert np.array_equal(SPACE.decode(tokens), codes)
    assert tokens.min() >= SPACE.token_offset and tokens.max() < SPACE.vocabulary_size
    for level in range(1, 5):
        start, stop = SPACE.token_range(level)
        assert ((tokens[:, level - 1] >= start) & (tokens[:, level - 1] < stop)).all()
    assert SPACE.token_range(4)[1] == SPACE.vocabulary_size


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_prefixes_count_only_contiguous_codes_of_one_item_in_one_document(data):
    # Mostly true SIDs, cut up by stray tokens and document borders.
    tokens, segments, segment = [], [], 1
    while len(tokens) < 24:
        kind = data.draw(st.integers(0, 5))
        if kind <= 3:
            codes = [data.draw(st.integers(0, size - 1)) for size in SPACE.codebook_sizes]
            piece = SPACE.encode(np.array(codes)).tolist()
            piece = piece[: data.draw(st.integers(1, 4))]
        else:
            piece = [data.draw(st.integers(0, SPACE.vocabulary_size - 1))]
        segment += kind == 5
        tokens += piece
        segments += [segment] * len(piece)
    tokens, segments = tokens[:24], segments[:24]
    segments[22:] = [0, 0]
    level, codes = SPACE.prefixes(np.array([tokens]), np.array([segments]))
    for at in range(24):
        expected = prefix_at(SPACE, tokens, segments, at)
        assert int(level[0, at]) == len(expected)
        assert codes[0, at].tolist() == expected + [0] * (4 - len(expected))


def random_catalog(rng: np.random.Generator, items: int, sizes=(3, 5, 2, 4)) -> Catalog:
    sids = np.stack([rng.integers(0, size, items) for size in sizes], axis=1)
    return Catalog(sids, [None] * items, SidSpace(sizes))


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10_000), items=st.integers(1, 60))
def test_groups_hold_exactly_the_items_of_each_sid(seed, items):
    catalog = random_catalog(np.random.default_rng(seed), items)
    by_sid: dict[tuple, list[int]] = {}
    for item, sid in enumerate(catalog.sids.tolist()):
        by_sid.setdefault(tuple(sid), []).append(item)
    assert len(catalog.group_sids) == len(by_sid) == len(catalog.group_sizes)
    for sid, members in by_sid.items():
        group = catalog.group(np.array(sid))
        assert catalog.items_of_group(group).tolist() == members
        assert catalog.group_sizes[group] == len(members)
        assert {int(catalog.group_of_item[item]) for item in members} == {group}
    missing = next((s for s in np.ndindex(3, 5, 2, 4) if s not in by_sid), None)
    assert missing is None or catalog.group(np.array(missing)) == -1


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10_000), items=st.integers(1, 60))
def test_trie_spells_exactly_the_catalogue_in_group_order(seed, items):
    catalog = random_catalog(np.random.default_rng(seed), items)
    trie = Trie(catalog)
    spelled = []

    def walk(node: int, prefix: tuple) -> None:
        if len(prefix) == catalog.space.levels:
            spelled.append((node, prefix))
            return
        codes, children, valid = (
            np.asarray(x) for x in trie.children(len(prefix) + 1, np.array([node]))
        )
        for code, child in zip(codes[0][valid[0]], children[0][valid[0]], strict=True):
            walk(int(child), (*prefix, int(code)))

    walk(0, ())
    expected = [(group, tuple(sid)) for group, sid in enumerate(catalog.group_sids.tolist())]
    assert spelled == expected
