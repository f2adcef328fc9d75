"""A table as the paper prints it: ours beside the paper's, with intervals and costs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

from prefixmem_jax.page import save_figure
from prefixmem_jax.text import aligned

matplotlib.use("Agg")
import matplotlib.pyplot as plt

CUTOFFS = (10, 20, 50, 100)


def describe(result: dict[str, Any]) -> str:
    """The table as text. Accuracies are in percent; a difference is from the first row."""
    levels = len(result["data"]["levels"])
    metrics = [f"tf_accuracy/level_{level}" for level in range(1, levels + 1)]
    metrics += [f"sid_recall@{cutoff}/unconstrained" for cutoff in CUTOFFS] + ["sid_hit_rate"]
    heads = [f"L{level}" for level in range(1, levels + 1)]
    heads += [f"R@{cutoff}" for cutoff in CUTOFFS] + ["hits"]
    lines = [["", *heads, "rate", "Mtokens", "TFLOP", "s"]]
    for row in result["rows"].values():
        costs = [row["tokens"] / 1e6, row["flops"] / 1e12, row["seconds"]]
        lines.append(
            [
                row["title"],
                *(_percent(row["metrics"].get(name)) for name in metrics),
                f"{row['learning_rate']:g}",
                *(f"{cost:.3g}" for cost in costs),
            ]
        )
        numbers = [row["paper"].get(name) for name in metrics]
        if any(number is not None for number in numbers):
            cells = ["" if number is None else f"{number:g}" for number in numbers]
            lines.append(["  in the paper", *cells, "", "", "", ""])
    return "\n".join(
        [
            *aligned(lines),
            "",
            *_differences(result, metrics),
            "",
            *_by_met(result),
            "",
            *_regime(result["data"]),
        ]
    )


def plot(path: Path, result: dict[str, Any]) -> None:
    """Accuracy at the deepest level against how often training met the prefix."""
    figure, axis = plt.subplots(figsize=(7, 4))
    pieces = result["by_met"]
    names = [f"{piece['from']:,}+" for piece in pieces]
    for row, one in result["rows"].items():
        values = [100 * piece["accuracy"][row] for piece in pieces]
        axis.plot(names, values, marker="o", label=one["title"])
    axis.set_xlabel("times that training met the prefix")
    axis.set_ylabel(f"accuracy at level {len(result['data']['levels'])}, %")
    axis.legend(fontsize=8)
    figure.tight_layout()
    save_figure(figure, path)
    plt.close(figure)


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f}"


def _differences(result: dict[str, Any], metrics: list[str]) -> list[str]:
    first, *others = result["rows"].values()
    deepest = [name for name in metrics if name.startswith("tf_")][-1]
    lines = [f"against {first['title']}, paired over users, 95% interval; each seed's:"]
    for row in others:
        for name in (deepest, f"sid_recall@{CUTOFFS[-1]}/unconstrained"):
            if name not in row.get("against_first", {}):
                continue
            one, base = row["against_first"][name], first["metrics"][name]
            seeds = ", ".join(_percent(seed[name]) for seed in row["by_seed"])
            relative = f" ({one['difference'] / base:+.0%})" if base else ""
            lines.append(
                f"  {row['title']}, {name}: {100 * one['difference']:+.1f}{relative}, "
                f"{100 * one['low']:+.1f} to {100 * one['high']:+.1f}; {seeds}"
            )
    return lines


def _by_met(result: dict[str, Any]) -> list[str]:
    lines = ["deepest level, by how often training met the prefix:"]
    for piece in result["by_met"]:
        values = "  ".join(f"{100 * value:.1f}" for value in piece["accuracy"].values())
        lines.append(f"  {piece['from']:>5,}+ ({piece['users']:,} users): {values}")
    return lines


def _regime(data: dict[str, Any]) -> list[str]:
    lines = [f"{data['items']:,} items; before each level:"]
    for level, one in enumerate(data["levels"], start=1):
        if level == 1:
            continue
        best = (
            "" if data["optimum"] is None else f", best possible {data['optimum'][level - 1]:.3f}"
        )
        lines.append(
            f"  L{level}: {one['prefixes']:,} prefixes, met {one['met']:,.0f} times (median of the "
            f"test's); counting reaches {one['counting_accuracy']:.3f}{best}"
        )
    if "in_regime" in data:
        reached, inside = data["baseline_of_optimum"], data["in_regime"]
        lines.append(
            f"the baseline reaches {reached:.0%} of the best possible at the deepest level: "
            + (
                "in the paper's regime"
                if inside
                else "OUT of the regime, it has little left to learn"
            )
        )
    return lines
