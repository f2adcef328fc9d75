"""What a comparison looks like: a table for the terminal, plots, one self-contained page."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from prefixmem_jax.evaluation.metrics import CUTOFFS, SPLIT_BY_TRANSITION
from prefixmem_jax.page import figure, image, preformatted, table, write_page
from prefixmem_jax.text import aligned, visible

Results = dict[str, dict[str, Any]]

_COLORS = {
    "baseline": "#7f7f7f",
    "prefixmem": "#d62728",
    "heuristic_popularity": "#c7c7c7",
    "heuristic_successor": "#9ecae1",
    "heuristic_transition": "#4292c6",
    "heuristic_item_knn": "#6baed6",
    "optimum": "#2ca02c",
}


def _color(system: str, number: int) -> str:
    return _COLORS.get(system, f"C{number % 10}")


def _label(system: str) -> str:
    """A run's name in a legend, which leaves out those that start with `_`."""
    return f" {visible(system)}" if system.startswith("_") else visible(system)


def metric_rows(levels: int) -> list[str]:
    """The metrics that tables show, in order."""
    deepest = f"tf_accuracy/level_{levels}"
    return [
        *(f"tf_accuracy/level_{level}" for level in range(1, levels + 1)),
        *(f"{deepest}/{part}" for part in ("reachable", "unreachable")),
        *(f"{deepest}/{part}" for part in ("rare", "medium", "popular")),
        "sid_hit_rate",
        "unique_level_1",
        "sid_coverage@10",
        "popularity@10",
        "bleu",
        "sid_recall@10/unconstrained",
        "sid_recall@10/constrained",
        *(f"item_recall@{cutoff}/constrained" for cutoff in CUTOFFS),
        *(f"item_ndcg@{cutoff}/constrained" for cutoff in (5, 10)),
        "item_mrr@10/constrained",
        *(f"{name}/{part}" for name in SPLIT_BY_TRANSITION for part in ("memorised", "new")),
    ]


def text_table(results: Results, levels: int) -> str:
    """The comparison as text, one column per system, with PrefixMem's ratio to the baseline.

    Metrics that no system has (cut-offs beyond the beam) are left out.
    """
    systems = list(results)
    compared = {"baseline", "prefixmem"} <= set(systems)
    lines = [["metric", *map(visible, systems), *(["ratio"] if compared else [])]]
    for metric in metric_rows(levels):
        values = [results[system].get(metric) for system in systems]
        if all(value is None for value in values):
            continue
        cells = ["-" if value is None else f"{value:.4f}" for value in values]
        lines.append([metric, *cells, *([_ratio(results, metric)] if compared else [])])
    text = aligned(lines)
    text.insert(1, "-" * len(text[0]))
    return "\n".join(text)


def _ratio(results: Results, metric: str) -> str:
    base, ours = (results[name].get(metric) for name in ("baseline", "prefixmem"))
    return "-" if not base or ours is None else f"{ours / base:.2f}x"


def plot_learning_curves(path: Path, curves: dict[str, list[dict]], levels: int) -> None:
    """Validation loss and deepest-level accuracy against steps, seconds and FLOPs.

    Args:
      curves: per system, validation records with `step`, `seconds`, `flops` (stage 1 counted
        in the last two) and `validation/...`.
    """
    metrics = ("validation/loss", f"validation/accuracy/level_{levels}")
    with figure(path, 12, 6.5) as drawn:
        axes = drawn.subplots(2, 3, sharey="row")
        for row, metric in enumerate(metrics):
            for column, (key, label, scale) in enumerate(
                (
                    ("step", "steps", 1),
                    ("seconds", "training seconds, stage 1 included", 1),
                    ("flops", "training TFLOPs, stage 1 included", 1e-12),
                )
            ):
                axis = axes[row, column]
                for system, records in curves.items():
                    axis.plot(
                        [record[key] * scale for record in records],
                        [record[metric] for record in records],
                        color=_COLORS[system],
                        label=system,
                        marker=".",
                    )
                axis.set_xlabel(label)
                axis.grid(alpha=0.3)
            axes[row, 0].set_ylabel(metric.removeprefix("validation/").replace("_", " "))
        axes[0, 0].legend()
        drawn.suptitle("Validation while training (teacher-forced, next item of held-out users)")


def plot_bars(path: Path, results: Results, metrics: list[str], title: str) -> None:
    """One group of bars per metric, one bar per system that has it."""
    with figure(path, max(6.0, 2.1 * len(metrics)), 4) as drawn:
        axis = drawn.subplots()
        width = 0.8 / len(results)
        for index, (system, values) in enumerate(results.items()):
            shift = (index - (len(results) - 1) / 2) * width
            shown = [i for i, metric in enumerate(metrics) if metric in values]
            heights = [values[metrics[i]] for i in shown]
            places = [i + shift for i in shown]
            color = _color(system, index)
            bars = axis.bar(places, heights, width, label=_label(system), color=color)
            axis.bar_label(bars, fmt="%.3f", fontsize=7, rotation=90, padding=2)
        labels = [metric.removeprefix("tf_accuracy/").replace("/", "\n") for metric in metrics]
        axis.set_xticks(range(len(metrics)), labels)
        axis.margins(y=0.15)
        axis.grid(axis="y", alpha=0.3)
        axis.set_title(title)
        drawn.legend(fontsize=8, loc="outside lower center", ncols=len(results))


def plot_recall(path: Path, results: Results) -> None:
    """Item recall against K, constrained, with bootstrap intervals where there are some."""
    with figure(path, 6, 4) as drawn:
        axis = drawn.subplots()
        for number, (system, values) in enumerate(results.items()):
            names = {k: f"item_recall@{k}/constrained" for k in CUTOFFS}
            shown = [k for k, name in names.items() if name in values]
            color = _color(system, number)
            recall = [values[names[k]] for k in shown]
            axis.plot(shown, recall, marker="o", color=color, label=_label(system))
            if shown and "intervals" in values:  # a beam may be narrower than the least K
                low, high = zip(*(values["intervals"][names[k]] for k in shown), strict=True)
                axis.fill_between(shown, low, high, color=color, alpha=0.15)
        axis.set(xlabel="K", ylabel="item recall@K, constrained")
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)


def write_comparison(folder: Path, results: Results, levels: int) -> None:
    """The plots of `prefixmem evaluate`: recall against K, accuracy by level and by part."""
    plot_recall(folder / "recall.png", results)
    by_level = [f"tf_accuracy/level_{level}" for level in range(1, levels + 1)]
    plot_bars(
        folder / "accuracy_by_level.png", results, by_level, "Teacher-forced accuracy by level"
    )
    parts = ("reachable", "unreachable", "rare", "medium", "popular")
    plot_bars(
        folder / "accuracy_by_part.png",
        results,
        [f"{by_level[-1]}/{part}" for part in parts],
        f"Level {levels}: reachable or not, and by popularity of the target's prefix",
    )


def comparison_table(paired: dict[str, Any], levels: int) -> str:
    """Differences to the first run with 95% intervals and p, one line per system and metric."""
    rows = [
        f"tf_accuracy/level_{levels}",
        "item_recall@10/constrained",
        "item_recall@100/constrained",
        "item_ndcg@10/constrained",
        *(f"{name}/{part}" for name in SPLIT_BY_TRANSITION for part in ("memorised", "new")),
    ]
    lines = []
    for system, metrics in paired.items():
        for name in (row for row in rows if row in metrics):
            one = metrics[name]
            lines.append(
                f"{visible(system)}  {name}  {one['difference']:+.4f}  "
                f"[{one['low']:+.4f}, {one['high']:+.4f}]  p {one['p']:.3f}"
            )
    return "\n".join(lines)


def write_report(
    folder: Path, results: Results, curves: dict[str, list[dict]], facts: str, differences: str
) -> Path:
    """Writes the plots and `report.html`, which needs no other file.

    Args:
      facts: text that says what was compared, shown above the table.
      differences: PrefixMem minus baseline, as text, shown below it.
    """
    levels = sum(name.startswith("prefix_hit_rate/") for name in results["baseline"])
    plot_learning_curves(folder / "learning_curves.png", curves, levels)
    plot_bars(
        folder / "accuracy_by_level.png",
        results,
        [f"tf_accuracy/level_{level}" for level in range(1, levels + 1)],
        "Teacher-forced accuracy by level (test)",
    )
    plot_bars(
        folder / "retrieval.png",
        results,
        [
            "sid_recall@10/unconstrained",
            "sid_recall@10/constrained",
            "item_recall@10/constrained",
            "item_ndcg@10/constrained",
        ],
        "Retrieval over the full catalogue (test)",
    )
    costs = [
        ("decoder steps", "steps"),
        ("tokens, stage 1 included", "tokens"),
        ("parameters, memory included", "parameters"),
        ("training seconds, stage 1 included", "seconds"),
        ("training FLOPs, stage 1 included", "flops"),
    ]
    rows = [["cost", "baseline", "prefixmem"]]
    for label, key in costs:
        rows.append([label, *(f"{results[s][key]:,.0f}" for s in ("baseline", "prefixmem"))])
    plots = ("learning_curves.png", "accuracy_by_level.png", "retrieval.png")
    page = folder / "report.html"
    write_page(
        page,
        "PrefixMem against its baseline",
        [
            *map(preformatted, (facts, text_table(results, levels), differences)),
            table(rows),
            *(image(folder / name) for name in plots),
        ],
    )
    return page
