"""Being asked to end early: Ctrl-C, or a machine that is about to be taken away."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import jax
from jax.experimental import multihost_utils

from prefixmem_jax.errors import Stopped


@contextmanager
def stops_between_steps() -> Iterator[Callable[[int], Stopped | None]]:
    """Says after each step whether to end, and then as what.

    A signal does not stop whatever runs: an exception inside a library's callback may be swallowed
    there, or leave half of a save. A second Ctrl-C stops at once.

    One process ends after the step in which SIGINT or SIGTERM came. Several end together, after
    either to any of them, at a step that JAX's preemption service agrees on. That one hears SIGTERM
    alone, so SIGINT is handed on as one.
    """
    together = jax.process_count() > 1
    received: list[int] = []

    def handle(number: int, frame: Any) -> None:
        del frame
        if received and number == signal.SIGINT:
            os._exit(128 + number)
        received.append(number)
        if together:
            os.kill(os.getpid(), signal.SIGTERM)

    def asked(step: int) -> Stopped | None:
        ends = multihost_utils.reached_preemption_sync_point(step) if together else bool(received)
        return Stopped(received[0] if received else signal.SIGTERM) if ends else None

    if threading.current_thread() is not threading.main_thread():
        yield asked
        return
    # Of several processes, SIGTERM is JAX's own.
    numbers = (signal.SIGINT,) if together else (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.signal(number, handle) for number in numbers}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
