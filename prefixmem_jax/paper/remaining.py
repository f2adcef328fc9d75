"""How far the runs of tables are: the number of each, and the time that is left."""

from __future__ import annotations

import threading
import time
from pathlib import Path

from tqdm import tqdm


class Remaining:
    """Counts runs by their folders; any thread may call."""

    def __init__(self, total: int):
        """Of `total` runs, none met yet."""
        self._total, self._since, self._lock = total, time.monotonic(), threading.Lock()
        self._met: dict[Path, bool] = {}  # those met, and whether they were done before
        self._done = 0

    def found(self, run: Path) -> None:
        """It was done before."""
        with self._lock:
            self._met.setdefault(run, True)

    def begin(self, run: Path) -> str:
        """It starts: says which of all it is, and once one is done, how long the others take."""
        with self._lock:
            self._met[run] = False
            text = f"run {len(self._met)} of {self._total}"
            if not self._done:
                return text
            left = self._total - sum(self._met.values()) - self._done
            seconds = (time.monotonic() - self._since) / self._done * left
            return f"{text}, about {tqdm.format_interval(seconds)} left"

    def end(self, run: Path) -> None:
        """It is done now."""
        with self._lock:
            self._done += not self._met[run]
