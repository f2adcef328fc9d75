"""Means over users, how sure they are, and whether two systems differ."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

RESAMPLES = 1000
_CHUNK = 50


def means(scores: Mapping[str, np.ndarray]) -> dict[str, float]:
    """Mean over the users that count; a metric that no user counts in is left out."""
    counted = {name: ~np.isnan(values) for name, values in scores.items()}
    return {n: float(v[counted[n]].mean()) for n, v in scores.items() if counted[n].any()}


def intervals(
    scores: Mapping[str, np.ndarray], confidence: float = 0.95, seed: int = 0
) -> dict[str, tuple[float, float]]:
    """Bootstrap percentile intervals of `means`, over resampled users."""
    scores = {name: scores[name] for name in means(scores)}
    tail = 100 * (1 - confidence) / 2
    results = {}
    for name, resampled in _resampled_means(scores, seed).items():
        low, high = np.nanpercentile(resampled, [tail, 100 - tail])
        results[name] = (float(low), float(high))
    return results


def compare(
    first: Mapping[str, np.ndarray], second: Mapping[str, np.ndarray], seed: int = 0
) -> dict[str, dict[str, float]]:
    """Paired bootstrap of second minus first, where both evaluated the same users in one order.

    Returns:
      By metric that both have: `difference`, its 95% interval `low`, `high`, and `p`, two-sided,
      the chance of as large a difference if there were none.
    """
    shared = [name for name in first if name in second]
    differences = {name: second[name] - first[name] for name in shared}
    differences = {n: v for n, v in differences.items() if not np.isnan(v).all()}
    results = {}
    for name, resampled in _resampled_means(differences, seed).items():
        low, high = np.nanpercentile(resampled, [2.5, 97.5])
        below = (1 + np.sum(resampled <= 0)) / (1 + RESAMPLES)
        above = (1 + np.sum(resampled >= 0)) / (1 + RESAMPLES)
        results[name] = {
            "difference": float(np.nanmean(differences[name])),
            "low": float(low),
            "high": float(high),
            "p": float(min(1.0, 2 * min(below, above))),
        }
    return results


def _resampled_means(scores: Mapping[str, np.ndarray], seed: int) -> dict[str, np.ndarray]:
    """Means of resamples of users, the same users for every metric: [RESAMPLES] each."""
    names = list(scores)
    if not names:
        return {}
    table = np.stack([scores[name] for name in names], axis=1)
    counted = (~np.isnan(table)).astype(np.float64)
    table = np.nan_to_num(table)
    users = len(table)
    rng = np.random.default_rng(seed)
    results = np.empty((RESAMPLES, len(names)))
    for start in range(0, RESAMPLES, _CHUNK):
        times = rng.multinomial(users, np.full(users, 1 / users), size=_CHUNK).astype(np.float64)
        with np.errstate(invalid="ignore", divide="ignore"):
            results[start : start + _CHUNK] = (times @ table) / (times @ counted)
    return dict(zip(names, results.T, strict=True))
