"""The quality report of SIDs: text for the terminal, JSON, plots, and one HTML page."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from prefixmem_jax.files import write_json
from prefixmem_jax.page import figure, image, preformatted, write_page
from prefixmem_jax.semantic_ids.quality import MET, target_levels, verdicts_on
from prefixmem_jax.text import aligned

PAGE = "sids.html"
# Measures of a level, how they are headed, and how they are shown.
COLUMNS = {
    "codes": ("codes", ",d"),
    "used": ("used", ",d"),
    "perplexity": ("perplexity", ",.1f"),
    "entropy": ("bits", ".2f"),
    "conditional_entropy": ("bits after prefix", ".2f"),
    "prefixes": ("prefixes", ",d"),
    "reconstruction_error": ("error left", ".3f"),
    "neighbour_purity": ("neighbours together", ".3f"),
    "neighbour_purity_by_chance": ("by chance", ".3f"),
    "next_item_bits": ("bits of next item", ".2f"),
    "counting_accuracy": ("counting", ".3f"),
    "met_often_enough": ("met {}-{} times".format(*MET), ".3f"),
}


def describe(measured: dict[str, Any]) -> str:
    """The report as text."""
    shown = [name for name in COLUMNS if name in measured["levels"][0]]
    rows = [["level", *(COLUMNS[name][0] for name in shown)]]
    for number, one in enumerate(measured["levels"], start=1):
        rows.append([str(number), *(format(one[name], COLUMNS[name][1]) for name in shown)])
    lines = aligned(rows)
    facts = (
        f"{measured['items']:,} items, {measured['distinct']:,} distinct SIDs, "
        f"{measured['sharing']:,} items share theirs, the largest group has "
        f"{measured['largest_group']:,}"
    )
    said = [f"{'ok  ' if one.good else 'LOOK'}  {one.words}" for one in verdicts_on(measured)]
    return "\n".join([facts, "", *lines, "", *said])


def write_report(folder: Path, measured: dict[str, Any]) -> None:
    """Writes `sids.json`, `sids.png` and `sids.html` into a folder."""
    verdicts = [asdict(one) for one in verdicts_on(measured)]
    levels = list(target_levels(measured))
    write_json(folder / "sids.json", measured | {"verdicts": verdicts, "target_levels": levels})
    _plot(folder / "sids.png", measured["levels"])
    write_page(
        folder / PAGE,
        "Semantic IDs: quality report",
        [preformatted(describe(measured)), image(folder / "sids.png")],
    )


def _plot(path: Path, levels: list[dict[str, Any]]) -> None:
    groups = [
        ("bits of a code", ("entropy", "conditional_entropy", "next_item_bits")),
        ("share of codes", ("used", "perplexity")),
        ("error, neighbours, counting",
         ("reconstruction_error", "neighbour_purity", "neighbour_purity_by_chance",
          "counting_accuracy", "met_often_enough")),
    ]  # fmt: skip
    with figure(path, 12, 3.6) as drawn:
        axes = drawn.subplots(1, len(groups))
        numbers = range(1, len(levels) + 1)
        for axis, (title, names) in zip(axes, groups, strict=True):
            for name in (name for name in names if name in levels[0]):
                values = [one[name] for one in levels]
                if title == "share of codes":
                    values = [one[name] / one["codes"] for one in levels]
                axis.plot(numbers, values, marker="o", label=COLUMNS[name][0])
            axis.set(title=title, xlabel="level", xticks=list(numbers))
            axis.set_ylim(bottom=0)
            axis.grid(alpha=0.3)
            if axis.has_data():
                axis.legend(fontsize=8)
