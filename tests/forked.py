"""Processes that start with everything imported, so that a command costs what it does.

`run` is `subprocess.run` of a function: a new process with its own environment, working folder and
output, forked from one that has imported what commands import and has started nothing.
"""

import multiprocessing
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(
    [
        "prefixmem_jax.start", "prefixmem_jax.sweep", "prefixmem_jax.benchmarks.step",
        "prefixmem_jax.hf.export", "torch", "transformers.models.auto", "matplotlib.pyplot",
        "frozen",
    ]
)  # fmt: skip


def run(
    target: Callable[..., int | None],
    arguments: Sequence[object],
    environment: dict[str, str],
    timeout: float,
) -> subprocess.CompletedProcess:
    """Calls a function of a module in a new process; its exit status is what it returns."""
    with tempfile.TemporaryDirectory() as folder:
        streams = [Path(folder) / name for name in ("out", "err")]
        process = start(target, arguments, environment, *streams)
        process.join(timeout)
        if process.exitcode is None:
            process.kill()
            process.join()
        written = [path.read_text(errors="surrogateescape") for path in streams]
        return subprocess.CompletedProcess(arguments, process.exitcode, *written)


def start(
    target: Callable[..., int | None],
    arguments: Sequence[object],
    environment: dict[str, str],
    out: Path,
    err: Path,
) -> multiprocessing.Process:
    """The same, not waited for; its output goes to two files."""
    process = _CONTEXT.Process(target=_call, args=(target, arguments, environment, out, err))
    process.start()
    return process


def _call(
    target: Callable[..., int | None],
    arguments: Sequence[object],
    environment: dict[str, str],
    out: Path,
    err: Path,
) -> None:
    os.environ.clear()
    os.environ.update(environment)
    for path, name, number in ((out, "stdout", 1), (err, "stderr", 2)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), number)
        stream = open(number, "w", encoding="utf-8", errors="strict", closefd=False)  # noqa: SIM115
        setattr(sys, name, stream)
        setattr(sys, f"__{name}__", stream)
    sys.exit(target(*arguments))


def command(*arguments: str) -> int:
    """The command `prefixmem`."""
    from prefixmem_jax.cli import main

    sys.argv = ["prefixmem", *arguments]
    return main(arguments)


def script_without_us(script: str) -> None:
    """A script that can import neither this package nor JAX."""
    for name in list(sys.modules):
        if name.partition(".")[0] in ("prefixmem_jax", "jax", "flax", "orbax", "optax", "grain"):
            del sys.modules[name]
    sys.modules["prefixmem_jax"] = sys.modules["jax"] = None
    exec(compile(script, "<script>", "exec"), {"__name__": "__main__"})
