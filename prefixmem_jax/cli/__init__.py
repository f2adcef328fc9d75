"""The command `prefixmem`: one verb, one function, no logic."""

from __future__ import annotations

import argparse
import signal
import traceback
from collections.abc import Sequence

from prefixmem_jax.cli import terminal, verbs
from prefixmem_jax.cli.parser import parse
from prefixmem_jax.errors import Stopped, UserError
from prefixmem_jax.parallel.tpu_flags import set_tpu_flags

# Verbs that keep what they have done, and go on from there.
RESUMED = (
    verbs.start_,
    verbs.sids,
    verbs.quickstart,
    verbs.train,
    verbs.resume,
    verbs.evaluate,
    verbs.sweep,
    verbs.paper,
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one verb; whatever ends it early is one line on stderr.

    Returns:
      The exit status: 2 for a user's mistake, 1 where the machine failed (a file, memory), 130
      where the user interrupted it, 143 where it was told to end (SIGTERM), 141 where nobody reads
      on.
    """
    terminal.prepare()
    set_tpu_flags()
    resumed = distributed = False
    try:
        options = parse(arguments)
        resumed, distributed = _is_resumed(options), getattr(options, "distributed", False)
        options.verb(options)
        terminal.flush()
    except SystemExit as stop:  # of --help, and of mistakes in the arguments
        return stop.code
    except KeyboardInterrupt as stop:
        more = "; the same command goes on from what was saved" if resumed else ""
        status = 128 + (stop.number if isinstance(stop, Stopped) else signal.SIGINT)
        return terminal.fail(f"interrupted{more}", status)
    except BrokenPipeError:
        return terminal.abandon()
    except Exception as error:
        status = _failed(error, distributed)
        if status is None and not distributed:
            raise
        if status is None:
            traceback.print_exc()
            status = 1
        if distributed:  # one that failed alone is not waited for: its launcher sees that it has
            from prefixmem_jax.parallel.mesh import leave

            leave(status)
        return status
    return 0


def _failed(error: Exception, distributed: bool) -> int | None:
    """Says in one line what a verb failed with: the exit status; None where the mistake is ours."""
    if isinstance(error, UserError):
        return terminal.fail(str(error), 2)
    if isinstance(error, OSError):
        return terminal.fail(_reason(error), 1)
    what = _exhausted(error) or (_left_alone(error) if distributed else None)
    if what is None:
        return None
    return terminal.fail(f"{what} ({str(error).partition(chr(10))[0]})", 1)


def _is_resumed(options: argparse.Namespace) -> bool:
    """Whether the command keeps what it has done: of recommending, where that is to many users."""
    if options.verb is verbs.recommend:
        return options.histories is not None
    return options.verb in RESUMED


def _reason(error: OSError) -> str:
    """What failed, and with which file; the one that was to be written, of a renaming."""
    reason = error.strerror or str(error) or type(error).__name__
    path = error.filename2 or error.filename
    return reason if path is None else f"{path}: {reason}"


def _exhausted(error: Exception) -> str | None:
    """What the machine has no more of, where that is what is wrong; libraries say it in words."""
    if "No space left on device" in str(error):
        return "the disk is full"
    if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error):
        return "not enough memory"
    return None


def _left_alone(error: Exception) -> str | None:
    """What to say where a collective, or the coordinator, lost the other processes."""
    if any(word in str(error) for word in ("Gloo", "CoordinationService", "coordination service")):
        return "another process has ended or does not answer; its own output says why"
    return None
