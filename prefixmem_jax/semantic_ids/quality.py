"""How good SIDs are, measured before anything is trained on them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from prefixmem_jax.semantic_ids.collisions import groups_of
from prefixmem_jax.semantic_ids.vectors import Vectors

# Items whose neighbours are looked up, among how many, and how many neighbours.
QUERIES, AMONG, NEIGHBOURS = 1000, 20_000, 10
# How often a run meets each likely code after a prefix that a memory gains from, as far as was
# measured (docs/paper.md): rarer ones tell it nothing, of others the decoder learns all itself.
MET = (3, 20)
# Vectors whose reconstruction is measured.
RECONSTRUCTED = 50_000


@dataclass(frozen=True)
class Verdict:
    """What a measure says.

    Attributes:
      good: whether nothing has to be done about it.
      words: one sentence, with the measure and the threshold.
    """

    good: bool
    words: str


def prefix_ids(sids: np.ndarray) -> np.ndarray:
    """The number of each SID's prefix of every length among the distinct ones.

    Args:
      sids: int [N, levels].

    Returns:
      int64 [levels, N]; row l - 1 is of the prefixes of l codes, in lexicographic order.
    """
    return np.stack([groups_of(sids[:, :length]) for length in range(1, sids.shape[1] + 1)])


def times_met(before: np.ndarray, after: np.ndarray, trained_on: np.ndarray) -> np.ndarray:
    """How often training meets each likely code after a prefix.

    That is how often it meets the prefix, over the perplexity of the code that follows: a prefix of
    one item is known after fewer meetings than one of sixteen.

    Args:
      before, after: of each item, the number of its prefix and of the one that is a code longer.
      trained_on: items of interactions, int [any].

    Returns:
      float64 [prefixes before]; one turn of the training data.
    """
    counts = np.bincount(after[trained_on], minlength=after.max() + 1)
    parent = np.zeros(len(counts), np.int64)
    parent[after] = before
    met = np.bincount(parent, counts, minlength=before.max() + 1)
    share = counts / np.maximum(met, 1)[parent]
    bits = -share * np.log2(np.maximum(share, 1e-300))
    return met / 2 ** np.bincount(parent, bits, minlength=len(met))


def entropy(ids: np.ndarray, weights: np.ndarray | None = None) -> float:
    """Bits of the distribution of `ids`, each counted once or by its weight."""
    counts = np.bincount(ids, weights).astype(np.float64)
    shares = counts[counts > 0] / counts.sum()
    return float(max(-(shares * np.log2(shares)).sum(), 0.0))


def measure(
    sids: np.ndarray,
    codes: tuple[int, ...],
    trained_on: np.ndarray | None = None,
    held_out: np.ndarray | None = None,
    vectors: Vectors | None = None,
    decode: Callable[[np.ndarray], np.ndarray] | None = None,
    turns: float = 1.0,
) -> dict[str, Any]:
    """Measures of a catalogue's SIDs.

    Args:
      sids: int [items, levels]; codes: of each level.
      trained_on, held_out: items of interactions, int [any]; for what counting reaches.
      vectors: what the SIDs were made of, for how well prefixes gather neighbours.
      decode: vectors of codes [n, levels or fewer], for reconstruction errors.
      turns: how often a run trains on all of that.

    Returns:
      `items`, `distinct`, `sharing` (items whose SID is not theirs alone), `largest_group`, and
      `levels`: for each, by name, numbers. Entropies are in bits. `counting_accuracy` is that of
      the code that followed a held-out item's prefix most often in training; `met_often_enough`
      the share of held-out items after whose prefix the run meets each likely code `MET` times.
    """
    ids = prefix_ids(sids)
    sizes = np.bincount(ids[-1])
    levels: list[dict[str, Any]] = []
    for level, (size, column) in enumerate(zip(codes, sids.T, strict=True)):
        before = np.zeros_like(ids[0]) if level == 0 else ids[level - 1]
        used = len(np.unique(column))
        one: dict[str, Any] = {
            "codes": size,
            "used": used,
            "dead": size - used,
            "entropy": entropy(column),
            "perplexity": 2 ** entropy(column),
            "conditional_entropy": entropy(ids[level]) - entropy(before),
            "prefixes_before": int(before.max() + 1),
            "prefixes": int(ids[level].max() + 1),
        }
        if trained_on is not None:
            weights = np.bincount(trained_on, minlength=len(sids))
            one["next_item_bits"] = entropy(ids[level], weights) - entropy(before, weights)
        if trained_on is not None and held_out is not None and len(held_out):
            one["counting_accuracy"] = _counting(before, ids[level], trained_on, held_out)
            met = turns * times_met(before, ids[level], trained_on)[before[held_out]]
            one["met_often_enough"] = float(np.mean((met >= MET[0]) & (met < MET[1])))
        levels.append(one)
    if decode is not None:
        _add_errors(levels, sids, vectors, decode)
    if vectors is not None:
        _add_purity(levels, ids, vectors)
    return {
        "items": len(sids),
        "distinct": len(sizes),
        "sharing": int(sizes[sizes > 1].sum()),
        "largest_group": int(sizes.max()),
        "levels": levels,
    }


def _counting(
    before: np.ndarray, after: np.ndarray, trained_on: np.ndarray, held_out: np.ndarray
) -> float:
    counts = np.bincount(after[trained_on], minlength=after.max() + 1)
    parent = np.zeros(after.max() + 1, np.int64)
    parent[after] = before
    # The child of each prefix that was seen most often; of equals, the first.
    by = np.lexsort((np.arange(len(parent)), -counts, parent))
    first = np.r_[True, parent[by][1:] != parent[by][:-1]]
    best = np.full(before.max() + 1, -1)
    best[parent[by][first]] = np.where(counts[by][first] > 0, by[first], -1)
    return float(np.mean(best[before[held_out]] == after[held_out]))


def _sample(count: int, most: int) -> np.ndarray:
    return np.sort(np.random.default_rng(0).choice(count, min(count, most), replace=False))


def _add_errors(
    levels: list[dict[str, Any]],
    sids: np.ndarray,
    vectors: Vectors,
    decode: Callable[[np.ndarray], np.ndarray],
) -> None:
    """Squared error of the vectors that the first codes stand for, over the vectors' variance."""
    items = _sample(len(sids), RECONSTRUCTED)
    wanted = vectors.take(items)
    variance = float(((wanted - wanted.mean(axis=0)) ** 2).sum(axis=1).mean())
    for level, one in enumerate(levels, start=1):
        error = ((wanted - decode(sids[items, :level])) ** 2).sum(axis=1).mean()
        one["reconstruction_error"] = float(error) / max(variance, 1e-30)


def _add_purity(levels: list[dict[str, Any]], ids: np.ndarray, vectors: Vectors) -> None:
    """How often the nearest neighbours share a prefix, and how often any two items do."""
    items = _sample(vectors.count, AMONG)
    found = vectors.take(items)
    found /= np.maximum(np.linalg.norm(found, axis=1, keepdims=True), 1e-30)
    queries = _sample(len(items), QUERIES)
    alike = found[queries] @ found.T
    alike[np.arange(len(queries)), queries] = -np.inf
    count = min(NEIGHBOURS, len(items) - 1)
    nearest = np.argpartition(-alike, count - 1, axis=1)[:, :count] if count else alike[:, :0]
    for one, of in zip(levels, ids[:, items], strict=True):
        shares = np.bincount(of) / len(of)
        one["neighbour_purity"] = float(np.mean(of[nearest] == of[queries][:, None]))
        one["neighbour_purity_by_chance"] = float((shares**2).sum())


def target_levels(measured: dict[str, Any]) -> tuple[int, ...]:
    """Levels at which a memory can help: those with more prefixes before them than there are codes.

    A code's embedding can say what the code means wherever it stands; what it means after each of
    so many prefixes only a memory of prefixes can.
    """
    tokens = sum(one["codes"] for one in measured["levels"])
    return tuple(
        number
        for number, one in enumerate(measured["levels"], start=1)
        if one["prefixes_before"] > tokens
    )


def verdicts_on(measured: dict[str, Any]) -> list[Verdict]:
    """What the measures say, in sentences."""
    said = []
    for number, one in enumerate(measured["levels"], start=1):
        share = one["used"] / one["codes"]
        said.append(
            Verdict(
                share >= 0.8,
                f"level {number}: {one['used']:,} of {one['codes']:,} codes are used "
                f"({share:.0%}; expected 80% or more)",
            )
        )
        evenness = one["perplexity"] / one["used"]
        last = number == len(measured["levels"])  # which may but tell apart those that collide
        said.append(
            Verdict(
                evenness >= 0.5 or last,
                f"level {number}: items spread over codes as over {one['perplexity']:,.0f} even "
                f"ones ({evenness:.0%} of those used; expected 50% or more, else an hourglass)",
            )
        )
    last = measured["levels"][-1]
    said.append(
        Verdict(
            last["conditional_entropy"] >= 0.1 or len(measured["levels"]) == 1,
            f"the last level tells {last['conditional_entropy']:.2f} bits that the prefix did not "
            "(expected 0.1 or more: a level that tells nothing costs a step of decoding)",
        )
    )
    sharing = measured["sharing"] / measured["items"]
    said.append(
        Verdict(
            sharing <= 0.02,
            f"{measured['sharing']:,} items ({sharing:.1%}) share a SID with others "
            "(expected 2% or fewer)",
        )
    )
    for number, one in enumerate(measured["levels"], start=1):
        if number > 1 and "met_often_enough" in one:
            share = one["met_often_enough"]
            said.append(
                Verdict(
                    True,
                    f"level {number}: {share:.0%} of next items come after a prefix of which one "
                    f"turn of training meets each likely code {MET[0]} to {MET[1]} times, which is "
                    "where a small decoder gained most from a memory (docs/paper.md)",
                )
            )
    levels = target_levels(measured)
    said.append(
        Verdict(
            True,
            f"a memory of prefixes can help at levels {', '.join(map(str, levels))}, where more "
            "prefixes lead than there are codes; whether it does depends on how long a run trains: "
            "`prefixmem paper regime`"
            if levels
            else "no level has more prefixes before it than there are codes: a memory of prefixes "
            "has little to add",
        )
    )
    return said
