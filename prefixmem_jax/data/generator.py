"""Synthetic datasets of any size, written as they are drawn, whose best accuracy is known.

Catalogue: a full tree. Every prefix has `children` of its level, whose codes are drawn at random
from the level's codebook, so that a code means nothing without the codes before it; every leaf is
an item.

Users: each is of one of a few *groups* and of one of a few *styles*, both unseen. With probability
`loyalty` the next item has the first two codes of the last one; else a group's likes decide the
first, and Zipf's law among the prefix's children the second. Deeper codes follow Zipf's law too:
by `personal` in an order that prefix and style decide, else in one that the prefix alone decides.

So `personal` is a regime. At 0 the prefix alone settles deep levels, and counting learns them. At
1 it takes the prefix and the user: what each of very many prefixes means to whom.

Nothing is kept of prefixes: order and codes come from hashes of their numbers.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, NamedTuple

import numpy as np
from pydantic import Field, PositiveInt

from prefixmem_jax.config_groups import Seed, Share, Sizes
from prefixmem_jax.errors import UserError
from prefixmem_jax.kinds import STRICT

# Users that are drawn at a time.
CHUNK = 1 << 16
WORDS = ("red", "soft", "old", "tall", "blue", "warm", "new", "lamp", "chair", "cup", "rug", "pot")


@dataclass(frozen=True)
class GeneratorConfig:
    """Size and shape of a generated dataset; `data.generator` says what each means.

    Attributes:
      codebook_sizes, children: by level; powers of two. The items are the product of the children.
      exponent: of Zipf's law.
      titles: whether items have titles, of words that their codes say.
    """

    __pydantic_config__ = STRICT

    users: PositiveInt = 100_000
    codebook_sizes: Sizes = (2048, 2048, 2048, 2048, 2048)
    children: Sizes = (64, 8, 8, 8, 8)
    groups: Annotated[PositiveInt, Field(le=1000)] = 16
    styles: Annotated[PositiveInt, Field(le=1000)] = 16
    loyalty: Share = 0.5
    personal: Share = 1.0
    exponent: Annotated[float, Field(ge=0, le=10)] = 1.2
    mean_length: Annotated[float, Field(ge=3, le=10_000)] = 10.0
    max_length: Annotated[PositiveInt, Field(ge=3, le=10_000)] = 40
    titles: bool = False
    seed: Seed = 0

    @property
    def levels(self) -> int:
        return len(self.children)

    @property
    def items(self) -> int:
        return int(np.prod(np.array(self.children, np.int64)))

    def check(self) -> None:
        """Raises UserError where keys contradict each other."""
        if len(self.children) != len(self.codebook_sizes) or self.levels < 3:
            raise UserError(
                f"children={self.children}, codebook_sizes={self.codebook_sizes}: expected as many "
                "of one as of the other, and 3 levels or more"
            )
        for codes, children in zip(self.codebook_sizes, self.children, strict=True):
            if codes & (codes - 1) or children & (children - 1) or children > codes:
                raise UserError(
                    f"children={self.children}, codebook_sizes={self.codebook_sizes}: expected "
                    "powers of two, no more children than codes"
                )


class Users(NamedTuple):
    """Some users.

    Attributes:
      lengths: items of each, int64 [users].
      digits: of every item, which child it is on each level, int64 [users, most items, levels].
      groups, styles: int64 [users].
    """

    lengths: np.ndarray
    digits: np.ndarray
    groups: np.ndarray
    styles: np.ndarray


class Generator:
    """The process that a config describes."""

    def __init__(self, config: GeneratorConfig):
        config.check()
        self.config = config
        self._zipf = [np.arange(1, count + 1.0) ** -config.exponent for count in config.children]
        self._zipf = [weights / weights.sum() for weights in self._zipf]

    def users(self) -> Iterator[Users]:
        """All users, some at a time; the same config gives the same ones."""
        for first in range(0, self.config.users, CHUNK):
            yield self.draw(min(CHUNK, self.config.users - first), (self.config.seed, first))

    def draw(self, count: int, seed: int | tuple[int, ...]) -> Users:
        """So many users."""
        config, rng = self.config, np.random.default_rng(seed)
        groups, styles = (rng.integers(0, n, count) for n in (config.groups, config.styles))
        lengths = 2 + rng.geometric(1 / (config.mean_length - 2), count)
        # The longest first, so that those who go on are.
        lengths = -np.sort(-np.minimum(lengths, config.max_length))
        digits = np.zeros((count, int(lengths.max()), config.levels), np.int64)
        for at in range(digits.shape[1]):
            here = int((lengths > at).sum())
            new = digits[:here, at]
            stays = (rng.random(here) < config.loyalty) & (at > 0)
            new[:, 0] = self._ranked(0, groups[:here], self._ranks(rng, 0, here))
            new[:, 1] = self._ranked(1, new[:, 0], self._ranks(rng, 1, here))
            if at:
                new[stays, :2] = digits[:here, at - 1, :2][stays]
            for level in range(2, config.levels):
                nodes = self.nodes(new, level)
                ranks = self._ranks(rng, level, here)
                own = rng.random(here) < config.personal
                who = np.where(own, 1 + styles[:here], 0)
                new[:, level] = self._ranked(level, nodes * (config.styles + 1) + who, ranks)
        order = rng.permutation(count)
        return Users(lengths[order], digits[order], groups[order], styles[order])

    def _ranks(self, rng: np.random.Generator, level: int, count: int) -> np.ndarray:
        """Ranks by Zipf's law, int64 [count]."""
        upto = np.cumsum(self._zipf[level])
        return np.minimum(np.searchsorted(upto, rng.random(count), side="right"), len(upto) - 1)

    def nodes(self, digits: np.ndarray, level: int) -> np.ndarray:
        """Number of the prefix before a level (from 0) of digits [..., levels]."""
        node = np.zeros(digits.shape[:-1], np.int64)
        for before in range(level):
            node = node * self.config.children[before] + digits[..., before]
        return node

    def _ranked(self, level: int, keys: np.ndarray, ranks: np.ndarray) -> np.ndarray:
        """Which child has a rank, in the order that a key gives: [...] of [...] and [...]."""
        count = np.uint64(self.config.children[level])
        step, start = self._order(level, keys)
        return ((ranks.astype(np.uint64) * step + start) % count).astype(np.int64)

    def _chances(self, level: int, keys: np.ndarray) -> np.ndarray:
        """Probability of each child, in the order that a key gives: float64 [..., children]."""
        ranks = np.arange(self.config.children[level])
        children = self._ranked(level, keys[..., None], ranks)
        chances = np.empty(children.shape)
        np.put_along_axis(chances, children, np.broadcast_to(self._zipf[level], children.shape), -1)
        return chances

    def _order(self, level: int, keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        mixed = _mixed(keys, self.config.seed * 64 + 2 * level)
        return mixed | np.uint64(1), mixed >> np.uint64(32)

    def codes(self, digits: np.ndarray) -> np.ndarray:
        """SIDs int32 [..., levels] of digits."""
        found = np.empty(digits.shape, np.int32)
        for level, size in enumerate(self.config.codebook_sizes):
            mixed = _mixed(self.nodes(digits, level), self.config.seed * 64 + 2 * level + 1)
            step, start = mixed | np.uint64(1), mixed >> np.uint64(32)
            codes = digits[..., level].astype(np.uint64) * step + start
            found[..., level] = codes % np.uint64(size)
        return found

    def item_digits(self, items: np.ndarray) -> np.ndarray:
        """Digits int64 [..., levels] of items: `nodes(digits, levels)` backwards."""
        found = np.empty((*items.shape, self.config.levels), np.int64)
        for level in reversed(range(self.config.levels)):
            items, found[..., level] = np.divmod(items, self.config.children[level])
        return found

    def titles(self, codes: np.ndarray) -> list[str]:
        """Words for all codes but the last, which is a number."""
        words = [
            [f"{WORDS[c % len(WORDS)]}{c // len(WORDS)}" for c in range(size)]
            for size in self.config.codebook_sizes
        ]
        return [
            " ".join([*(words[level][code] for level, code in enumerate(sid[:-1])), str(sid[-1])])
            for sid in codes.tolist()
        ]

    def optimum(self, users: Users) -> tuple[np.ndarray, np.ndarray]:
        """The best top-1 accuracy of each level of users' last items, true prefix given.

        Exact, by Bayes' rule over groups and styles: the mean over users of the most probable
        code's probability.

        Returns:
          From the whole history and the prefix; and from the prefix alone, as counting has it at
          best: float64 [levels] each. The latter is not a number for levels 1 and 2.
        """
        config, count = self.config, len(users.lengths)
        log_groups, log_styles = np.zeros((count, config.groups)), np.zeros((count, config.styles))
        first, second = self._first_chances(), self._chances(1, np.arange(config.children[0]))
        for at in range(users.digits.shape[1] - 1):
            known = users.lengths > at + 1
            digits = users.digits[known, at]
            free = first[:, digits[:, 0]].T * second[digits[:, 0], digits[:, 1]][:, None]
            if at:
                same = (digits[:, :2] == users.digits[known, at - 1, :2]).all(axis=1)
                free = config.loyalty * same[:, None] + (1 - config.loyalty) * free
            log_groups[known] += np.log(free)
            for level in range(2, config.levels):
                chances = self._deep_chances(digits, level)
                there = digits[:, level][:, None, None]
                log_styles[known] += np.log(np.take_along_axis(chances, there, axis=2)[..., 0])
        everyone = np.arange(count)
        target, last = (users.digits[everyone, users.lengths - back] for back in (1, 2))
        groups, styles = _normalised(log_groups), _normalised(log_styles)
        best, alone = np.empty((count, config.levels)), np.full((count, config.levels), np.nan)

        chances = (1 - config.loyalty) * groups @ first
        chances[everyone, last[:, 0]] += config.loyalty
        best[:, 0] = chances.max(axis=1)
        mass = (1 - config.loyalty) * (groups * first[:, target[:, 0]].T).sum(axis=1)
        chances = mass[:, None] * second[target[:, 0]]
        stays = target[:, 0] == last[:, 0]
        chances[everyone[stays], last[stays, 1]] += config.loyalty
        best[:, 1] = chances.max(axis=1) / chances.sum(axis=1)
        log_styles, of_prefix = np.log(styles + 1e-300), np.zeros_like(styles)
        for level in range(2, config.levels):
            chances = self._deep_chances(target, level)
            there = np.take_along_axis(chances, target[:, level][:, None, None], axis=2)[..., 0]
            for known, found in ((log_styles, best), (of_prefix, alone)):
                expected = np.einsum("us,usc->uc", _normalised(known), chances)
                found[:, level] = expected.max(axis=1)
                known += np.log(there)
        return best.mean(axis=0), alone.mean(axis=0)

    def _first_chances(self) -> np.ndarray:
        """Of the first code by group: [groups, children]."""
        return self._chances(0, np.arange(self.config.groups))

    def _deep_chances(self, digits: np.ndarray, level: int) -> np.ndarray:
        """Of a deep level's children by style, after digits [users, levels]: [users, styles, c]."""
        config = self.config
        nodes = self.nodes(digits, level)[:, None] * (config.styles + 1)
        own = self._chances(level, nodes + 1 + np.arange(config.styles))
        return config.personal * own + (1 - config.personal) * self._chances(level, nodes)


def _mixed(keys: np.ndarray, seed: int) -> np.ndarray:
    """A 64-bit hash of whole numbers (SplitMix64)."""
    with np.errstate(over="ignore"):
        x = np.asarray(keys).astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        x += np.uint64((seed * 0xD1B54A32D192ED03 + 0x632BE59BD9B4E019) % 2**64)
        for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
            x = (x ^ (x >> np.uint64(shift))) * np.uint64(factor)
        return x ^ (x >> np.uint64(31))


def _normalised(log_weights: np.ndarray) -> np.ndarray:
    weights = np.exp(log_weights - log_weights.max(axis=1, keepdims=True))
    return weights / weights.sum(axis=1, keepdims=True)
