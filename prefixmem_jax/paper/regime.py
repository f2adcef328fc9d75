"""Whether data have something for a memory to know: counted before training, judged after it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from prefixmem_jax.data.prepare import PreparedData
from prefixmem_jax.semantic_ids.quality import MET, measure, prefix_ids

# A baseline above this share of the best possible accuracy leaves nothing to show.
SOLVED = 0.8
# With a smaller share of next items after prefixes that are met often enough, few can gain.
GAINING = 0.25
# How often a prefix was met in training: from each of these to the next.
PIECES = (0, 1, 3, 10, 30, 100, 300, 1000, 3000)


def measure_regime(data: PreparedData, optimum: list[float] | None) -> dict[str, Any]:
    """What counting codes after prefixes reaches, and how often prefixes are met.

    Args:
      optimum: the best possible accuracy by level, where it is known.

    Returns:
      `items`, `optimum`, and `levels`: of each `counting_accuracy`; but for the first also
      `prefixes` (distinct ones before it), `met` (how often training meets that of a test target,
      the median), and `met_often_enough` (the share of test targets where it is `MET` times).
    """
    catalog, split = data.catalog, data.split
    trained = split.items[split.train.indices()]
    counted = measure(catalog.sids, catalog.space.codebook_sizes, trained, split.test.targets)
    levels = []
    for level, one in enumerate(counted["levels"], start=1):
        found = {"counting_accuracy": one["counting_accuracy"]}
        if level > 1:
            found["prefixes"] = one["prefixes_before"]
            found["met"] = float(np.median(times_met(data, level)))
            found["met_often_enough"] = one["met_often_enough"]
        levels.append(found)
    return {"items": len(catalog), "levels": levels, "optimum": optimum}


def judge(regime: Mapping[str, Any], baseline: float) -> dict[str, Any]:
    """Whether a baseline's accuracy at the deepest level leaves something to show.

    Returns:
      `baseline_of_counting`, its share of what counting reaches; `baseline_of_optimum`, of the best
      possible, where that is known; `in_regime`, by the latter where it is there.
    """
    found = {"baseline_of_counting": baseline / max(_best(regime | {"optimum": None}), 1e-9)}
    share = baseline / max(_best(regime), 1e-9)
    if regime["optimum"] is not None:
        found["baseline_of_optimum"] = share
    return found | {"in_regime": share < SOLVED}


def times_met(data: PreparedData, level: int) -> np.ndarray:
    """How often training met each test target's prefix before a level: int64 [users]."""
    split, ids = data.split, prefix_ids(data.catalog.sids)[level - 2]
    met = np.bincount(ids[split.items[split.train.indices()]], minlength=ids.max() + 1)
    return met[ids[split.test.targets]]


def by_times_met(data: PreparedData, deepest: Mapping[str, np.ndarray]) -> list[dict[str, Any]]:
    """Accuracy at the deepest level by how often training met the prefix before it.

    Args:
      deepest: by row, of each test user.
    """
    met, found = times_met(data, data.catalog.space.levels), []
    for low, high in zip(PIECES, (*PIECES[1:], np.inf), strict=True):
        here = (met >= low) & (met < high)
        if here.any():
            accuracy = {row: float(values[here].mean()) for row, values in deepest.items()}
            found.append({"from": low, "users": int(here.sum()), "accuracy": accuracy})
    return found


def describe_regime(regime: Mapping[str, Any]) -> list[str]:
    """Lines: what was counted, and the verdict, on a trained baseline if there is one."""
    lines = [f"{regime['items']:,} items; before each level:"]
    for level, one in enumerate(regime["levels"], start=1):
        if level == 1:
            continue
        line = (
            f"  L{level}: {one['prefixes']:,} prefixes, met {one['met']:,.0f} times (median of the "
            f"test's); counting reaches {one['counting_accuracy']:.3f}"
        )
        if regime["optimum"] is not None:
            line += f", best possible {regime['optimum'][level - 1]:.3f}"
        if "met_often_enough" in one:
            line += f"; {one['met_often_enough']:.0%} are met {MET[0]} to {MET[1]} times"
        lines.append(line)
    return [*lines, _verdict(regime)]


def _best(regime: Mapping[str, Any]) -> float:
    """The best accuracy at the deepest level that is known of."""
    if regime["optimum"] is not None:
        return regime["optimum"][-1]
    return regime["levels"][-1]["counting_accuracy"]


def _verdict(regime: Mapping[str, Any]) -> str:
    known = regime["optimum"] is not None
    of = "the best possible" if known else "what counting reaches"
    if "in_regime" in regime:
        share = regime["baseline_of_optimum" if known else "baseline_of_counting"]
        return f"the baseline reaches {share:.0%} of {of} at the deepest level: " + (
            "in the paper's regime"
            if regime["in_regime"]
            else "OUT of the regime, it has little left to learn"
        )
    share = regime["levels"][-1]["met_often_enough"]
    often = f"{share:.0%} of next items come after a deepest prefix met {MET[0]} to {MET[1]} times"
    if share < GAINING:
        return f"OUT of the regime: {often} (expected {GAINING:.0%} or more)"
    return (
        f"{often}: in the paper's regime as long as the baseline, trained, stays below "
        f"{SOLVED * _best(regime):.3f}, {SOLVED:.0%} of {of}"
    )
