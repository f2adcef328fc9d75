"""One self-contained HTML page: text, tables, and plots within it."""

from __future__ import annotations

import base64
import html
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from prefixmem_jax.files import replacing, write_text

if TYPE_CHECKING:
    from matplotlib.figure import Figure  # slow, and not everywhere

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1100px; margin: 2rem auto }
pre { background: #f6f8fa; padding: 1rem; overflow-x: auto }
img { max-width: 100%; display: block; margin: 1.5rem 0 }
td, th { padding: 0.2rem 1rem 0.2rem 0; text-align: left }
"""


def write_page(path: Path, title: str, body: Sequence[str]) -> None:
    """Writes HTML that needs no other file; `body` is made of the functions below."""
    write_text(
        path,
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f"<title>{html.escape(title)}</title>\n<style>{_STYLE}</style></head><body>\n"
        f"<h1>{html.escape(title)}</h1>\n" + "\n".join(body) + "\n</body></html>\n",
    )


@contextmanager
def figure(path: Path, width: float, height: float) -> Iterator[Figure]:
    """A figure to draw in, which is then written: a PNG where its name does not say otherwise.

    Whoever else uses matplotlib in the process finds it as it was. Names are shown as they are:
    `$^{` is no formula.

    Args:
      width, height: in inches.
    """
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context({"text.parse_math": False}):
        drawn = Figure(figsize=(width, height), layout="constrained")
        yield drawn
        with replacing(path) as beside:
            drawn.savefig(beside, dpi=120, format=path.suffix.lstrip(".") or "png")


def preformatted(text: str) -> str:
    return f"<pre>{html.escape(text)}</pre>"


def table(rows: Sequence[Sequence[str]]) -> str:
    """The first row is the header."""
    lines = []
    for number, row in enumerate(rows):
        kind = "td" if number else "th"
        cells = "".join(f"<{kind}>{html.escape(cell)}</{kind}>" for cell in row)
        lines.append(f"<tr>{cells}</tr>")
    return f"<table>{''.join(lines)}</table>"


def image(path: Path) -> str:
    """A PNG, within the page."""
    data = base64.b64encode(path.read_bytes()).decode()
    return f'<img alt="{html.escape(path.name)}" src="data:image/png;base64,{data}">'
