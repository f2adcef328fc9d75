"""Datasets of any size: drawn as their description says, and the best accuracy by brute force."""

import functools
import itertools
import json

import numpy as np
import pytest
from conftest import prefixmem

from prefixmem_jax.config_groups import DataConfig
from prefixmem_jax.data import generator as module
from prefixmem_jax.data.formats.parquet import read_dataset
from prefixmem_jax.data.generation import generate
from prefixmem_jax.data.generator import Generator, GeneratorConfig
from prefixmem_jax.data.prepare import prepare_data

SMALL = GeneratorConfig(
    users=300, codebook_sizes=(8, 4, 4, 8), children=(4, 2, 2, 4), groups=2, styles=3, personal=0.7,
    mean_length=5, max_length=9,
)  # fmt: skip


def test_every_prefix_has_its_own_codes_for_its_children():
    made = Generator(SMALL)
    items = np.arange(SMALL.items)
    digits = made.item_digits(items)
    np.testing.assert_array_equal(made.nodes(digits, 4), items)
    codes = made.codes(digits)
    assert len(np.unique(codes, axis=0)) == SMALL.items == 64
    assert (codes >= 0).all() and (codes.max(axis=0) < SMALL.codebook_sizes).all()
    for level in range(1, 4):
        children = {}
        for sid in codes.tolist():
            children.setdefault(tuple(sid[:level]), set()).add(sid[level])
        assert {len(found) for found in children.values()} == {SMALL.children[level]}
        assert len({frozenset(found) for found in children.values()}) > 1


def item_chances(made: Generator, last: int | None, group: int, style: int) -> np.ndarray:
    """P(item | last item, group, style) of every item, a code at a time."""
    config, found = made.config, np.empty(made.config.items)
    zipf = [np.arange(1, n + 1.0) ** -config.exponent for n in config.children]
    zipf = [weights / weights.sum() for weights in zipf]

    @functools.cache
    def chance(level, key, child):
        (rank,) = (
            r for r in range(config.children[level])
            if made._ranked(level, np.array([key]), np.array([r]))[0] == child
        )  # fmt: skip
        return zipf[level][rank]

    for item in range(config.items):
        digits = made.item_digits(np.array(item))
        first = chance(0, group, digits[0]) * chance(1, digits[0], digits[1])
        if last is not None:
            same = (made.item_digits(np.array(last))[:2] == digits[:2]).all()
            first = config.loyalty * same + (1 - config.loyalty) * first
        for level in (2, 3):
            node = int(made.nodes(digits, level)) * (config.styles + 1)
            own, common = (chance(level, node + who, digits[level]) for who in (1 + style, 0))
            first *= config.personal * own + (1 - config.personal) * common
        found[item] = first
    return found


@pytest.fixture(scope="module")
def tables():
    """Of every (last item or none, group, style), what comes next."""
    made = Generator(SMALL)
    kinds = itertools.product([None, *range(SMALL.items)], range(2), range(3))
    return made, {kind: item_chances(made, *kind) for kind in kinds}


def test_items_come_as_often_as_their_chances_say(tables):
    made, chances = tables
    users = made.draw(60_000, 5)
    items = made.nodes(users.digits, 4)
    for group, style in ((0, 0), (1, 2)):
        mine = (users.groups == group) & (users.styles == style)
        first = np.bincount(items[mine, 0], minlength=64) / mine.sum()
        np.testing.assert_allclose(first, chances[None, group, style], atol=0.012)
        last = np.bincount(items[mine, 0]).argmax()
        after = items[mine & (items[:, 0] == last) & (users.lengths > 1), 1]
        found = np.bincount(after, minlength=64) / len(after)
        np.testing.assert_allclose(found, chances[last, group, style], atol=0.05)
    assert users.lengths.min() == 3 and users.lengths.max() == 9
    assert users.lengths.mean() == pytest.approx(5, abs=0.2)


def test_the_optimum_is_that_of_all_classes_and_items_by_brute_force(tables):
    made, chances = tables
    users = made.draw(150, 9)
    best, alone = made.optimum(users)
    items = made.nodes(users.digits, 4)
    digits = made.item_digits(np.arange(64))
    classes = list(itertools.product(range(2), range(3)))
    expected, prefix_only = [], []
    for history, length in zip(items, users.lengths, strict=True):
        before, target = history[: length - 1], history[length - 1]
        posterior = np.array([
            np.prod([
                chances[last, g, s][item]
                for last, item in zip([None, *before[:-1]], before, strict=True)
            ])
            for g, s in classes
        ])  # fmt: skip
        posterior /= posterior.sum()
        mixed = sum(
            p * chances[before[-1], g, s] for p, (g, s) in zip(posterior, classes, strict=True)
        )
        # Which prefix it is says nothing here of what came before it.
        uniform = sum(chances[None, g, s] for g, s in classes)
        for distribution, into in ((mixed, expected), (uniform, prefix_only)):
            row = []
            for level in range(4):
                there = (digits[:, :level] == digits[target, :level]).all(axis=1)
                codes = np.bincount(digits[there, level], distribution[there])
                row.append(codes.max() / codes.sum())
            into.append(row)
    np.testing.assert_allclose(best, np.mean(expected, axis=0), rtol=1e-9)
    np.testing.assert_allclose(alone[2:], np.mean(prefix_only, axis=0)[2:], rtol=1e-9)
    assert np.isnan(alone[:2]).all() and (best[2:] > alone[2:]).all()


def test_what_is_written_is_a_dataset_drawn_piece_by_piece(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "CHUNK", 128)
    monkeypatch.setattr("prefixmem_jax.data.generation.CHUNK", 10)
    config = GeneratorConfig(**{**vars(SMALL), "titles": True})
    about = generate(config, tmp_path / "x")
    dataset = read_dataset(tmp_path / "x")
    made = Generator(config)
    drawn = [
        made.nodes(users.digits, 4)[user, :length]
        for users in made.users()
        for user, length in enumerate(users.lengths)
    ]
    assert len(drawn) == 300 and about["interactions"] == sum(map(len, drawn))
    np.testing.assert_array_equal(dataset.histories.items, np.concatenate(drawn))
    np.testing.assert_array_equal(dataset.catalog.sids, made.codes(made.item_digits(np.arange(64))))
    assert len(set(dataset.catalog.titles)) == 64
    options = DataConfig(path=str(tmp_path / "x"), codebook_sizes=config.codebook_sizes)
    assert len(prepare_data(options).split.test) == 300


def test_the_command_says_what_is_possible(tmp_path, refused):
    out = tmp_path / "x"
    arguments = ["data", "generate", "--out", out, "users=50", "children=(4,2,2,4)"]
    said = prefixmem(*arguments, "codebook_sizes=(8,4,4,8)").stdout
    about = json.loads((out / "generated.json").read_text())
    assert f"level 4: {about['optimum'][3]:.3f}; of the prefix alone" in said
    for wrong, words in (
        ("codebook_sizes=(8,4,4)", "expected as many of one as of the other"),
        ("codebook_sizes=(8,4,4,9)", "expected powers of two"),
        ("codebook_sizes=(8,4,4,2)", "no more children than codes"),
        ("userz=3", "no such key; did you mean users?"),
    ):
        assert words in refused(*arguments, wrong)
