"""What users see beside results: one line for each thing, and no logs of other packages."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import threading
import warnings

from prefixmem_jax.text import visible

PACKAGE = "prefixmem_jax"


class _Lines(logging.Handler):
    """What this package has to say, in between progress bars."""

    def emit(self, record: logging.LogRecord) -> None:
        from tqdm import tqdm

        tqdm.write(f"prefixmem: {visible(record.getMessage())}", file=sys.stderr)


_HANDLER, _NOWHERE = _Lines(logging.INFO), logging.NullHandler()


def prepare() -> None:
    """Sets up what is printed and logged; before anything that logs is imported."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # it warns where there is no torch
    logging.getLogger("absl").addFilter(_nothing)  # Orbax logs there too
    logging.getLogger().addHandler(_NOWHERE)  # what others log, and nobody asked to see
    logging.getLogger(PACKAGE).addHandler(_HANDLER)
    logging.getLogger(PACKAGE).setLevel(logging.INFO)
    if not sys.warnoptions:
        warnings.simplefilter("ignore")
    # What a thread fails with is raised where its result is needed.
    threading.excepthook = _log_thread
    for stream in (sys.stdin, sys.stdout):
        with contextlib.suppress(AttributeError):  # one that stands for the real one
            stream.reconfigure(errors="backslashreplace")


def _nothing(record: logging.LogRecord) -> bool:
    return False


def _log_thread(failure: threading.ExceptHookArgs) -> None:
    logging.getLogger(PACKAGE).debug("in a thread", exc_info=failure.exc_value)


def fail(message: str, status: int) -> int:
    """Says in one line why the command ends."""
    print(f"prefixmem: {visible(message)}", file=sys.stderr)
    return status


def flush() -> None:
    """Raises BrokenPipeError where nobody reads the output, as long as that can be caught."""
    sys.stdout.flush()


def abandon() -> int:
    """Nobody reads the output any more: says nothing, now or when Python ends."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (sys.stdout, sys.stderr):
        os.dup2(nowhere, stream.fileno())
    return 141
