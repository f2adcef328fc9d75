"""A table as the paper prints it: ours beside the paper's, with intervals, rates and costs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from prefixmem_jax.errors import UserError
from prefixmem_jax.files import read_json_object
from prefixmem_jax.paper.regime import describe_regime, judge
from prefixmem_jax.paper.tables import CUTOFFS, LEVELS, ROWS, SPLITS
from prefixmem_jax.text import aligned

Row = Mapping[str, Any]


def describe(result: dict[str, Any]) -> str:
    """The table as text. Accuracies are in percent; a difference is from the first row."""
    levels = len(result["data"]["levels"])
    columns = {f"L{level}": f"tf_accuracy/level_{level}" for level in range(1, levels + 1)}
    columns |= {f"R@{cutoff}": _recall(cutoff) for cutoff in CUTOFFS} | {"hits": "sid_hit_rate"}
    splits = {"are reachable": "reachable"}
    splits |= {split: f"{_deepest(result)}/{split}" for split in SPLITS}
    splits |= {"first codes": "unique_level_1"}
    aside = (
        ""
        if levels == LEVELS
        else f"the paper's L{LEVELS} stands beside our L{levels}, its L{LEVELS - 1} beside our "
        f"L{levels - 1}: levels are those from the deepest\n\n"
    )
    parts = [
        _beside_the_paper(result, "", columns, _costs),
        _beside_the_paper(result, f"of L{levels}", splits),
        _rates(result),
        _differences(result),
        *_equal_costs(result),
        _by_met(result),
        describe_regime(result["data"]),
    ]
    return aside + "\n\n".join("\n".join(lines) for lines in parts)


def markdown(result: dict[str, Any]) -> str:
    """What counts of a table, as README.md shows it: the two deepest levels and recall."""
    levels, first = len(result["data"]["levels"]), next(iter(result["rows"].values()))
    metrics = [f"tf_accuracy/level_{levels - 1}", _deepest(result), _recall(CUTOFFS[-1])]
    heads = [f"level {levels - 1}", f"level {levels}", f"Recall@{CUTOFFS[-1]}"]
    lines = [["", *heads, "*the paper, Qwen3-1.7B*"], ["---"] * (len(heads) + 2)]
    for row in result["rows"].values():
        cells = {name: f"{_percent(row['metrics'][name])}%" for name in metrics}
        if "against_first" in row:
            one = row["against_first"][_deepest(result)]
            low, high = 100 * one["low"], 100 * one["high"]
            before = first["metrics"][_deepest(result)]
            relative = f"{one['difference'] / before:+.0%}; " if before else ""
            cells[_deepest(result)] += f" ({relative}{low:+.1f} to {high:+.1f} points)"
        numbers = [in_paper(row, name, levels) for name in metrics]
        paper = ", ".join("-" if number is None else f"{number:g}" for number in numbers)
        lines.append([row["title"], *cells.values(), f"*{paper}*" if any(numbers) else ""])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines).replace("|  |", "| |")


def read_result(path: Path, table: str) -> dict[str, Any]:
    """A table's file; the paper's numbers, and the verdict on its data, are today's.

    Raises:
      UserError: it is none, another table's, or not all there.
    """
    result = read_json_object(path)
    if result.get("table") != table or not {"data", "rows", "by_met"} <= set(result):
        raise UserError(f"{path}: this is no result of `prefixmem paper {table}`")
    try:
        for name in result["rows"].keys() & ROWS.keys():
            result["rows"][name]["paper"] = dict(ROWS[name].paper)
        first = next(iter(result["rows"].values()))
        result["data"] |= judge(result["data"], first["metrics"][_deepest(result)])
        describe(result)
    except (AttributeError, LookupError, StopIteration, TypeError, ValueError) as error:
        what = f"{type(error).__name__}: {error}"
        raise UserError(f"{path}: damaged, not all of a table is there ({what})") from None
    return result


def _recall(cutoff: int) -> str:
    return f"sid_recall@{cutoff}/unconstrained"


def _deepest(result: dict[str, Any]) -> str:
    return f"tf_accuracy/level_{len(result['data']['levels'])}"


def in_paper(row: Row, metric: str, levels: int) -> float | None:
    """What the paper reports of a metric of ours; of accuracies, as far from the deepest level."""
    kind, _, rest = metric.partition("/level_")
    if rest:
        level, *split = rest.split("/")
        metric = "/".join([f"{kind}/level_{int(level) + LEVELS - levels}", *split])
    return row["paper"].get(metric)


def _costs(row: Row) -> dict[str, str]:
    costs = {"Mtokens": row["tokens"] / 1e6, "TFLOP": row["flops"] / 1e12, "s": row["seconds"]}
    rate = {"rate": f"{row['learning_rate']:g}"}
    return rate | {head: f"{cost:.3g}" for head, cost in costs.items()}


def _beside_the_paper(
    result: dict[str, Any],
    corner: str,
    columns: Mapping[str, str],
    more: Callable[[Row], dict[str, str]] = lambda row: {},
) -> list[str]:
    """Every row's metrics, and below it the paper's, if it has any of them.

    Args:
      columns: metrics by what heads them.
      more: further cells of a row by their heads, which the paper has not.
    """
    levels, rows = len(result["data"]["levels"]), list(result["rows"].values())
    further = list(more(rows[0]))
    lines = [[corner, *columns, *further]]
    for row in rows:
        cells = [_shown(name, row["metrics"].get(name)) for name in columns.values()]
        lines.append([row["title"], *cells, *more(row).values()])
        numbers = [in_paper(row, name, levels) for name in columns.values()]
        if any(number is not None for number in numbers):
            cells = ["" if number is None else f"{number:g}" for number in numbers]
            lines.append(["  in the paper", *cells, *[""] * len(further)])
    return aligned(lines)


def _shown(name: str, value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.1f}" if name == "unique_level_1" else _percent(value)


def _percent(value: float) -> str:
    return f"{100 * value:.1f}"


def _rates(result: dict[str, Any]) -> list[str]:
    """Every row's loss at the rates that were tried; the one that was chosen has a star."""
    rows = result["rows"].values()
    rates = sorted({rate for row in rows for rate in row["validation_loss"]}, key=float)
    lines = [["validation loss at rate", *rates]]
    for row in rows:
        tried, chosen = row["validation_loss"], f"{row['learning_rate']:g}"
        stars = {rate: "*" if rate == chosen else " " for rate in rates}
        cells = [f"{tried[rate]:.4f}{stars[rate]}" if rate in tried else "" for rate in rates]
        lines.append([row["title"], *cells])
    return aligned(lines)


def _differences(result: dict[str, Any]) -> list[str]:
    first, *others = result["rows"].values()
    lines = [f"against {first['title']}, paired over users, 95% interval; each seed's:"]
    for row in others:
        lines += _difference(result, row, first, row["against_first"])
    return lines


def _equal_costs(result: dict[str, Any]) -> Iterator[list[str]]:
    """Of every row that is compared with another than the first, for its costs: lines."""
    for row in result["rows"].values():
        if "against_equal_cost" in row:
            found = row["against_equal_cost"]
            base = result["rows"][found["row"]]
            costs = [f"{base[key] / row[key]:.2f} times its {key}" for key in ("flops", "seconds")]
            head = f"against {base['title']}, of {' and '.join(costs)}, alike:"
            yield [head, *_difference(result, row, base, found["differences"])]


def _difference(
    result: dict[str, Any], row: Row, base: Row, found: Mapping[str, Mapping[str, float]]
) -> Iterator[str]:
    """Lines on how a row differs from another where it counts."""
    for name in (_deepest(result), _recall(CUTOFFS[-1])):
        if name in found:
            one, before = found[name], base["metrics"][name]
            seeds = ", ".join(_percent(seed[name]) for seed in row["by_seed"])
            relative = f" ({one['difference'] / before:+.0%})" if before else ""
            yield (
                f"  {row['title']}, {name}: {100 * one['difference']:+.1f}{relative}, "
                f"{100 * one['low']:+.1f} to {100 * one['high']:+.1f}; {seeds}"
            )


def _by_met(result: dict[str, Any]) -> list[str]:
    lines = ["by how often the run met each likely code after the prefix:"]
    for piece in result["by_met"]:
        values = "  ".join(f"{_percent(value):>5}" for value in piece["accuracy"].values())
        head = f"L{piece['level']} {piece['from']:>3}+ ({piece['users']:,} users):"
        lines.append(f"  {head:<24}{values}")
    return lines
