"""Whether data have something for a memory to know: counted before training, judged after it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from prefixmem_jax.data.prepare import PreparedData
from prefixmem_jax.evaluation.metrics import Scores
from prefixmem_jax.semantic_ids.quality import MET, measure, prefix_ids, times_met

# A baseline above this share of the best possible accuracy leaves nothing to show.
SOLVED = 0.8
# With a smaller share of next items after prefixes that are met often enough, few can gain.
GAINING = 0.25
# How often the run met each likely code after a prefix: from each of these to the next.
PIECES = (0, 1, 3, 5, 10, 20, 40, 80, 160)


def measure_regime(data: PreparedData, turns: float, optimum: list[float] | None) -> dict[str, Any]:
    """What counting codes after prefixes reaches, and how often prefixes are met.

    Args:
      turns: how often the baseline's run trains on the data.
      optimum: the best possible accuracy by level, where it is known.

    Returns:
      `items`, `turns`, `optimum`, and `levels`: of each `counting_accuracy`; but for the first also
      `prefixes` (distinct ones before it), `met` (how often the run meets each likely code after
      that of a test target, the median; `times_met`), and `met_often_enough` (the share of test
      targets where it is `MET` times).
    """
    catalog, split = data.catalog, data.split
    trained = split.items[split.train.indices()]
    counted = measure(
        catalog.sids, catalog.space.codebook_sizes, trained, split.test.targets, turns=turns
    )
    levels = []
    for level, one in enumerate(counted["levels"], start=1):
        found = {"counting_accuracy": one["counting_accuracy"]}
        if level > 1:
            found["prefixes"] = one["prefixes_before"]
            found["met"] = float(np.median(_times_met(data, turns, level)))
            found["met_often_enough"] = one["met_often_enough"]
        levels.append(found)
    return {"items": len(catalog), "turns": turns, "levels": levels, "optimum": optimum}


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


def by_times_met(
    data: PreparedData, turns: float, scores: Mapping[str, Scores]
) -> list[dict[str, Any]]:
    """Accuracy at the two deepest levels by how often the run met each likely code there.

    Args:
      turns: how often the baseline's run trains on the data.
      scores: by row, of each test user.

    Returns:
      Of each level, from the least to the most often met: `level`, `from`, `users`, and `accuracy`
      by row.
    """
    levels, found = data.catalog.space.levels, []
    for level in (levels - 1, levels):
        met = _times_met(data, turns, level)
        for low, high in zip(PIECES, (*PIECES[1:], np.inf), strict=True):
            here = (met >= low) & (met < high)
            if here.any():
                name = f"tf_accuracy/level_{level}"
                accuracy = {row: float(one[name][here].mean()) for row, one in scores.items()}
                piece = {"level": level, "from": low, "users": int(here.sum())}
                found.append({**piece, "accuracy": accuracy})
    return found


def _times_met(data: PreparedData, turns: float, level: int) -> np.ndarray:
    """Of each test target, how often the run meets each likely code at a level: [users]."""
    split, ids = data.split, prefix_ids(data.catalog.sids)[level - 2 :]
    met = times_met(ids[0], ids[1], split.items[split.train.indices()])
    return turns * met[ids[0][split.test.targets]]


def describe_regime(regime: Mapping[str, Any]) -> list[str]:
    """Lines: what was counted, and the verdict, on a trained baseline if there is one."""
    lines = [
        f"{regime['items']:,} items, {regime['turns']:.1f} turns of the training data; before each "
        "level:"
    ]
    for level, one in enumerate(regime["levels"], start=1):
        if level == 1:
            continue
        line = (
            f"  L{level}: {one['prefixes']:,} prefixes, each likely code after them met "
            f"{one['met']:,.0f} times (median of the test's); counting reaches "
            f"{one['counting_accuracy']:.3f}"
        )
        if regime["optimum"] is not None:
            line += f", best possible {regime['optimum'][level - 1]:.3f}"
        lines.append(f"{line}; {one['met_often_enough']:.0%} are met {MET[0]} to {MET[1]} times")
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
    often = (
        f"at the deepest level {share:.0%} of next items are after a prefix of which the run meets "
        f"each likely code {MET[0]} to {MET[1]} times"
    )
    if share < GAINING:
        return f"OUT of the regime: {often} (expected {GAINING:.0%} or more)"
    return (
        f"{often}: in the paper's regime as long as the baseline, trained, stays below "
        f"{SOLVED * _best(regime):.3f}, {SOLVED:.0%} of {of}"
    )
