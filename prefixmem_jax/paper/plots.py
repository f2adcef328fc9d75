"""What a table's file holds, drawn: one figure of several panels."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes

from prefixmem_jax.page import figure
from prefixmem_jax.paper.tables import CUTOFFS, SPLITS

Result = dict[str, Any]
# Fewer test users than these are too few for a point of a curve.
FEWEST = 10


def plot(path: Path, result: Result) -> None:
    """Accuracy at the two deepest levels by how often the run met what follows; at the deepest by
    reachability, by the prefix's popularity, and against steps where the runs' curves are there;
    recall against K.
    """
    levels = len(result["data"]["levels"])
    panels = [partial(_by_met, level=level) for level in (levels, levels - 1)]
    panels += [_by_recall, _by_reachability, _by_popularity]
    panels += [_by_steps] * any(row.get("curve") for row in result["rows"].values())
    columns = (len(panels) + 1) // 2
    with figure(path, 6 * columns, 8) as drawn:
        axes = drawn.subplots(2, columns)
        for axis, draw in zip(axes.flat, panels, strict=False):
            draw(axis, result)
            axis.set_ylim(bottom=0)
            axis.grid(alpha=0.3)
        for axis in axes.flat[len(panels) :]:
            axis.remove()
        handles, labels = axes.flat[0].get_legend_handles_labels()
        drawn.legend(handles, labels, loc="outside lower center", ncols=2, fontsize=9)


def _deepest(result: Result) -> str:
    return f"tf_accuracy/level_{len(result['data']['levels'])}"


def _accuracy(axis: Axes, result: Result) -> None:
    axis.set_ylabel(f"accuracy at level {len(result['data']['levels'])}, %")


def _by_met(axis: Axes, result: Result, level: int) -> None:
    found = [piece for piece in result["by_met"] if piece["level"] == level]
    pieces = [piece for piece in found if piece["users"] >= FEWEST]
    names = [f"{piece['from']:,}+" for piece in pieces]
    for row, one in result["rows"].items():
        values = [100 * piece["accuracy"][row] for piece in pieces]
        axis.plot(names, values, marker="o", label=one["title"])
    axis.set_xlabel("times that the run met each likely code after the prefix")
    axis.set_ylabel(f"accuracy at level {level}, %")


def _by_recall(axis: Axes, result: Result) -> None:
    for one in result["rows"].values():
        recalls = {k: one["metrics"].get(f"sid_recall@{k}/unconstrained") for k in CUTOFFS}
        found = {k: 100 * recall for k, recall in recalls.items() if recall is not None}
        axis.plot(list(found), list(found.values()), marker="o")
    axis.set_xlabel("K")
    axis.set_ylabel("recall of SIDs among the first K, %")


def _by_reachability(axis: Axes, result: Result) -> None:
    _bars(axis, result, SPLITS[:2])
    axis.set_xlabel("the target's codes before, among the 10 likeliest or not")


def _by_popularity(axis: Axes, result: Result) -> None:
    _bars(axis, result, SPLITS[2:])
    axis.set_xlabel("thirds of the test's users, by how often training met the prefix")


def _bars(axis: Axes, result: Result, splits: Sequence[str]) -> None:
    """Accuracy on each split, a group of bars."""
    width = 0.8 / len(result["rows"])
    for number, one in enumerate(result["rows"].values()):
        values = [100 * one["metrics"].get(f"{_deepest(result)}/{name}", 0) for name in splits]
        places = [place + (number + 0.5) * width - 0.4 for place in range(len(splits))]
        axis.bar(places, values, width)
    axis.set_xticks(range(len(splits)), splits)
    _accuracy(axis, result)


def _by_steps(axis: Axes, result: Result) -> None:
    for one in result["rows"].values():
        curve = one.get("curve", [])
        axis.plot([step for step, _, _ in curve], [100 * value for _, _, value in curve])
    axis.set_xlabel("steps (validation)")
    _accuracy(axis, result)
