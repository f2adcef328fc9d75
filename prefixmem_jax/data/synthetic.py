"""A synthetic dataset whose best possible accuracy is known exactly.

Catalogue: a random tree. Level l's nodes have a few children each, whose codes are drawn at
random from the level's codebook, so that a code means nothing without the codes before it.
Items are leaves; popularity follows Zipf's law over a random order of the items.

Users: a user belongs to one of a few *taste groups*, unseen. A group likes some level-1 codes:
it weighs an item's popularity by `liking` where it likes the item's level-1 code. The first
item is drawn from the group's distribution. Each next item, with probability `loyalty`, is
drawn by popularity among the items that share the last item's first two codes, else from the
group's distribution again. Lengths are 3 plus a geometric number.

Because the process has one hidden variable with few values, Bayes' rule over the taste groups
gives the exact distribution of the next item given a history, hence the best accuracy that any
model could reach: `optimum`.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from prefixmem_jax.config_groups import SyntheticConfig
from prefixmem_jax.data.dataset import Dataset, Histories
from prefixmem_jax.semantic_ids.catalog import Catalog
from prefixmem_jax.semantic_ids.space import SidSpace


@dataclass(frozen=True)
class SyntheticProcess:
    """The process that made a synthetic dataset, with everything that models cannot see.

    Attributes:
      base: float64 [groups, items], each taste group's distribution over items.
      follow: float64 [items], popularity, to be normalised within a level-2 prefix.
      family: int64 [items], number of the item's level-2 prefix.
    """

    config: SyntheticConfig
    catalog: Catalog
    base: np.ndarray
    follow: np.ndarray
    family: np.ndarray
    family_total: np.ndarray = field(repr=False)

    def next_item_distribution(self, history: Sequence[int] | np.ndarray) -> np.ndarray:
        """Exact P(next item | history), float64 [items], for a history of one item or more."""
        loyalty = self.config.loyalty
        history = np.asarray(history)
        log_posterior = np.log(self.base[:, history[0]])
        for last, item in itertools.pairwise(history):
            stay = 0.0
            if self.family[last] == self.family[item]:
                stay = self.follow[item] / self.family_total[self.family[item]]
            log_posterior += np.log(loyalty * stay + (1 - loyalty) * self.base[:, item])
        posterior = np.exp(log_posterior - log_posterior.max())
        posterior /= posterior.sum()
        probability = (1 - loyalty) * (posterior @ self.base)
        family = self.family[history[-1]]
        siblings = self.family == family
        probability[siblings] += loyalty * self.follow[siblings] / self.family_total[family]
        return probability


def synthetic_catalog(config: SyntheticConfig) -> Catalog:
    """The catalogue of `make_synthetic` alone."""
    return _catalog(config, np.random.default_rng(config.seed))


def _catalog(config: SyntheticConfig, rng: np.random.Generator) -> Catalog:
    sids = _random_tree(config, rng)
    titles = [f"synthetic {number}" for number in range(len(sids))]
    return Catalog(sids, titles, SidSpace(config.codebook_sizes))


def _random_tree(config: SyntheticConfig, rng: np.random.Generator) -> np.ndarray:
    """SIDs of the items, int32 [items, levels]: leaves of a tree with random child codes."""
    child_codes: dict[tuple[int, ...], np.ndarray] = {}
    sids = np.empty((config.items, len(config.codebook_sizes)), np.int32)
    for sid in sids:
        for level, (size, children) in enumerate(
            zip(config.codebook_sizes, config.children, strict=True)
        ):
            prefix = tuple(int(code) for code in sid[:level])
            if prefix not in child_codes:
                child_codes[prefix] = rng.choice(size, size=min(children, size), replace=False)
            sid[level] = rng.choice(child_codes[prefix])
    return sids


def make_synthetic(config: SyntheticConfig) -> tuple[Dataset, SyntheticProcess]:
    """Draws a catalogue and histories; the same config gives the same bytes."""
    rng = np.random.default_rng(config.seed)
    catalog = _catalog(config, rng)
    sids = catalog.sids
    popularity = np.empty(config.items)
    popularity[rng.permutation(config.items)] = np.arange(1, config.items + 1.0) ** (
        -config.zipf_exponent
    )
    _, family = np.unique(sids[:, :2], axis=0, return_inverse=True)
    family = family.reshape(-1)
    base = np.tile(popularity, (config.groups, 1))
    for group in range(config.groups):
        liked = rng.choice(config.codebook_sizes[0], config.liked_codes, replace=False)
        base[group, np.isin(sids[:, 0], liked)] *= config.liking
    base /= base.sum(axis=1, keepdims=True)
    process = SyntheticProcess(
        config, catalog, base, popularity, family, np.bincount(family, popularity)
    )

    group_cdf = np.cumsum(base, axis=1)
    members = [np.flatnonzero(family == number) for number in range(family.max() + 1)]
    family_cdf = [np.cumsum(popularity[m]) / popularity[m].sum() for m in members]

    def draw(cdf: np.ndarray) -> int:
        return min(int(np.searchsorted(cdf, rng.random(), side="right")), len(cdf) - 1)

    sequences = []
    for _ in range(config.users):
        group = rng.integers(config.groups)
        length = min(2 + rng.geometric(1 / (config.mean_length - 2)), config.max_length)
        items = [draw(group_cdf[group])]
        while len(items) < length:
            if rng.random() < config.loyalty:
                own = family[items[-1]]
                items.append(int(members[own][draw(family_cdf[own])]))
            else:
                items.append(draw(group_cdf[group]))
        sequences.append(items)
    offsets = np.concatenate([[0], np.cumsum([len(items) for items in sequences])])
    flat = np.concatenate(sequences).astype(np.int64)
    histories = Histories(flat, offsets, [str(user) for user in range(config.users)])
    digest = hashlib.sha256(sids.tobytes() + flat.tobytes() + offsets.tobytes()).hexdigest()
    return Dataset("synthetic", catalog, histories, digest), process
