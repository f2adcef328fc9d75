"""A thread that says where a run hangs: a device, a peer or a disk that does not answer."""

from __future__ import annotations

import faulthandler
import logging
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import jax

from prefixmem_jax.files import replacing

log = logging.getLogger(__name__)

# Without a sign of life for so long, somebody should look.
HUNG_SECONDS = 600.0


class SignsOfLife:
    """When there was the last one, and after which step."""

    def __init__(self, step: int):
        self.note(step)

    def note(self, step: int) -> None:
        self.step, self.time = step, time.monotonic()


@contextmanager
def watchdog(run: Path, step: int) -> Iterator[SignsOfLife]:
    """Writes what every thread is at to `hung-process-I.txt` of the run, once for each silence."""
    signs, ended = SignsOfLife(step), threading.Event()

    def watch() -> None:
        told = None
        while not ended.wait(HUNG_SECONDS / 10):
            last = signs.time
            if told != last and time.monotonic() - last > HUNG_SECONDS:
                told = last
                path = run / f"hung-process-{jax.process_index()}.txt"
                with replacing(path) as beside, beside.open("w") as file:
                    faulthandler.dump_traceback(file)
                log.warning(
                    f"nothing for {HUNG_SECONDS:g} s after step {signs.step}; {path} says what "
                    "every thread is at"
                )

    thread = threading.Thread(target=watch, name="watchdog", daemon=True)
    thread.start()
    try:
        yield signs
    finally:
        ended.set()
        thread.join()
