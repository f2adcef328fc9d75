"""Processes that train and evaluate runs beside each other, each on cores of its own.

A small decoder keeps one core busier than two: two runs on a core each take less time than one
after the other on both. With an accelerator there is one process, which has it.
"""

from __future__ import annotations

import functools
import io
import multiprocessing
import os
import queue
import signal
import sys
import threading
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from pathlib import Path
from types import TracebackType
from typing import Any

from prefixmem_jax.benchmarks.timing import machine
from prefixmem_jax.config import Config
from prefixmem_jax.data.prepare import prepare_data
from prefixmem_jax.errors import Stopped, UserError
from prefixmem_jax.evaluation.evaluator import evaluate_run
from prefixmem_jax.parallel.compilation import keep_compiled_programs
from prefixmem_jax.parallel.host_memory import computes_on_cpus, keep_freed_memory
from prefixmem_jax.runs.run import Run
from prefixmem_jax.training.loop import train

# Where a machine has more cores, a run has several: each holds the data in memory.
MOST = 4

_data = functools.lru_cache(maxsize=1)(prepare_data)


def usual_count() -> int:
    """Processes that go with this machine."""
    return min(MOST, len(_cores())) if computes_on_cpus() else 1


class Workers:
    """A context in which runs are trained; its processes start when they are needed first.

    SIGTERM, like Ctrl-C, ends it once every run that is being trained is saved.
    """

    def __init__(self, count: int, prepare: Callable[[], None] | None = None):
        """At most `count` processes, each of which calls `prepare`, a function of a module, first.

        Raises:
          UserError: there would be none.
        """
        if count < 1:
            raise UserError(f"--jobs: expected 1 or more, got {count}")
        cores = _cores()
        self._prepare, self._stopped = prepare, False
        self._free: queue.SimpleQueue[_Worker] = queue.SimpleQueue()
        self._workers = [_Worker(cores[n % max(1, len(cores)) :: count]) for n in range(count)]
        for worker in self._workers:
            self._free.put(worker)

    def __enter__(self) -> Workers:
        self._before = signal.signal(signal.SIGTERM, _stop)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()
        signal.signal(signal.SIGTERM, self._before)

    def stop(self) -> None:
        """Ends what is running, once it is saved; what is asked for from now on fails."""
        self._stopped = True
        for worker in self._workers:
            worker.end()
        for worker in self._workers:
            worker.join()

    def train(self, config: Config, folder: Path, started: Callable[[], None]) -> None:
        """Trains a run, or goes on with it: waits until a process is free, and until it is done.

        Args:
          started: called in between.
        """
        self._call(_train, config, folder, started=started)

    def evaluate(self, folder: Path) -> None:
        """Evaluates a run on its test users, alike."""
        self._call(_evaluate, folder)

    def machine(self) -> dict[str, Any]:
        """What they run on: `benchmarks.timing.machine`."""
        return self._call(machine)

    def _call(self, *task: Any, started: Callable[[], None] = lambda: None) -> Any:
        worker = self._free.get()
        try:
            if self._stopped:
                raise Stopped(signal.SIGTERM)
            started()
            how, what = worker.call(task, self._prepare)
        finally:
            self._free.put(worker)
        if how == "mistaken":
            raise UserError(what)
        if how == "stopped" or (how == "died" and self._stopped):
            raise Stopped(what if how == "stopped" else signal.SIGTERM)
        if how == "died":
            raise ChildProcessError(f"the process of a run ended with status {what}")
        if how == "failed":
            raise RuntimeError(what)
        return what


class _Worker:
    """A process, once it has been called."""

    def __init__(self, cores: list[int]):
        self._cores = cores
        self._process: multiprocessing.Process | None = None
        self._busy = False

    def call(self, task: tuple, prepare: Callable[[], None] | None) -> tuple[str, Any]:
        """What `_answer` answers there; or that it died, and with which status."""
        if self._process is None:
            context = multiprocessing.get_context("spawn")
            self._connection, theirs = context.Pipe()
            arguments = (theirs, self._cores, prepare)
            process = context.Process(target=_serve, args=arguments)
            process.start()
            self._process = process
            theirs.close()
        self._busy = True
        try:
            self._connection.send(task)
            answer = self._connection.recv()
        except (EOFError, OSError):
            self._process.join()
            answer = "died", self._process.exitcode
        self._busy = False  # not so where a signal interrupts this
        return answer

    def end(self) -> None:
        """Has the process end: by itself, if it is doing nothing."""
        if self._busy:
            self._process.terminate()
        elif self._process is not None:
            self._connection.close()

    def join(self) -> None:
        if self._process is not None:
            self._process.join()


def _stop(number: int, frame: Any) -> None:
    del frame
    raise Stopped(number)


def _cores() -> list[int]:
    """That this process may use; empty where nothing says which."""
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []


class _WholeLines(io.TextIOWrapper):
    """Standard error without bars: those of several processes would write over each other."""

    def isatty(self) -> bool:
        return False


def _serve(connection: Connection, cores: list[int], prepare: Callable[[], None] | None) -> None:
    """Does what it is told, until nobody is there to tell.

    Ctrl-C on a terminal is the parent's, which asks to end once: a second signal might come while
    the first one's checkpoint is being written.
    """
    os.setpgrp()
    sys.stderr = _WholeLines(os.fdopen(os.dup(2), "wb", buffering=0), write_through=True)
    if prepare is not None:
        prepare()
    if cores:
        os.sched_setaffinity(0, cores)
    keep_freed_memory()
    keep_compiled_programs()
    threading.Thread(target=_end_with_parent, daemon=True).start()
    how = None
    while how != "stopped":
        try:
            function, *arguments = connection.recv()
        except EOFError:
            return
        how, what = _answer(function, *arguments)
        connection.send((how, what))


def _answer(function: Callable, *arguments: Any) -> tuple[str, Any]:
    try:
        return "done", function(*arguments)
    except UserError as error:
        return "mistaken", str(error)
    except KeyboardInterrupt as stop:
        return "stopped", getattr(stop, "number", signal.SIGINT)
    except Exception:
        return "failed", traceback.format_exc()


def _end_with_parent() -> None:
    """A run that is being trained is saved, where the process that started this one was killed."""
    wait([multiprocessing.parent_process().sentinel])
    os.kill(os.getpid(), signal.SIGTERM)


def _train(config: Config, folder: Path) -> None:
    train(config, folder, _data(config.data))


def _evaluate(folder: Path) -> None:
    run = Run(folder)
    evaluate_run(run, _data(run.config.data))
