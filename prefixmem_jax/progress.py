"""Progress of long work: a bar on a terminal, a line now and then where output is kept."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

from tqdm import tqdm

Thing = TypeVar("Thing")

SECONDS_BETWEEN_LINES = 15
SECONDS_UNSAID = 5  # what takes no longer needs no line
_LINE = "{desc}: {n_fmt}/{total_fmt} {unit}s, {elapsed} gone, {remaining} left{postfix}"


class _Lines(tqdm):
    """`tqdm` in whole lines."""

    @staticmethod
    def status_printer(file: Any) -> Callable[[str], None]:
        last = [""]

        def write(text: str) -> None:
            if text and text != last[0]:
                file.write(text + "\n")
                file.flush()
                last[0] = text

        return write

    def close(self) -> None:
        if not self.disable:
            if self.n > self.last_print_n and self._time() - self.start_t >= SECONDS_UNSAID:
                self.display()
            self.disable = True
            self._decr_instances(self)


def progress_bar(
    total: int, describe: str, unit: str, initial: int = 0, shown: bool = True
) -> tqdm:
    """Counts up to `total` on standard error; a context manager that is told `update(n)`.

    Args:
      describe: what is counted; nothing is shown without it.
    """
    options = {"total": total, "initial": initial, "desc": describe, "unit": unit}
    if not (shown and describe):
        return tqdm(**options, disable=True)
    if sys.stderr.isatty():
        return tqdm(**options, dynamic_ncols=True)
    return _Lines(
        **options,
        bar_format=_LINE,
        mininterval=SECONDS_BETWEEN_LINES,
        maxinterval=60,
        delay=SECONDS_UNSAID,
    )


def counted(things: Sequence[Thing], describe: str, unit: str) -> Iterator[Thing]:
    """The things one after the other, with a progress bar."""
    with progress_bar(len(things), describe, unit) as bar:
        for thing in things:
            yield thing
            bar.update()


def say(text: str) -> None:
    """A line on standard error, past any bar that is shown."""
    tqdm.write(text, file=sys.stderr)
