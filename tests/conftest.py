"""Eight simulated devices for all tests in this process; `one_device` is a mesh of the first.

Commands run as a user runs them, in processes of their own with one device, by `prefixmem`.
"""

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

os.environ["XLA_FLAGS"] = (
    "--xla_force_host_platform_device_count=8"
    # Most of the time goes into compiling small programs.
    " --xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
    " --xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=4"
)
os.environ["JAX_PLATFORMS"] = "cpu"
# The same programs are compiled by many tests and commands; once a session is enough.
if "PYTEST_XDIST_WORKER" not in os.environ:  # workers share that of the process that starts them
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="prefixmem-test-")
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
# No test asks where in the source an operation is from.
os.environ["JAX_TRACEBACK_IN_LOCATIONS_LIMIT"] = "0"

import forked
import jax
import pytest

from prefixmem_jax import cli
from prefixmem_jax.parallel.mesh import make_mesh

ROOT = Path(__file__).resolve().parents[1]
DATA = ROOT.parent / "shared" / "data"
# What commands are compiled with: they have one device.
QUICK = os.environ["XLA_FLAGS"].partition(" ")[2]


def command_environment() -> dict[str, str]:
    environment = {**os.environ, "XLA_FLAGS": QUICK}
    environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"
    return environment


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest tests first, so that no worker is left alone with one of them at the end."""
    items.sort(key=lambda item: item.path.name != "test_training.py")


def pytest_sessionfinish() -> None:
    if "PYTEST_XDIST_WORKER" not in os.environ:
        shutil.rmtree(os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)


def prefixmem(*arguments: object, expect: int = 0) -> subprocess.CompletedProcess:
    """Runs the command line in its own process and checks its exit status."""
    done = forked.run(forked.command, [*map(str, arguments)], command_environment(), timeout=500)
    assert done.returncode == expect, done.stdout + done.stderr
    return done


def python_process(script: str, *arguments: object, **environment: str) -> subprocess.Popen:
    """Python in a process of its own."""
    return subprocess.Popen(
        [sys.executable, "-c", script, *map(str, arguments)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**command_environment(), **environment},
        text=True,
    )


def python_block(document: str, having: str) -> str:
    """The one block of Python in a Markdown document with these words."""
    blocks = [part.split("```")[0] for part in document.split("```python\n")[1:]]
    (block,) = (block for block in blocks if having in block)
    return block


def python_without_us(script: str) -> str:
    """What a script prints in a process that can import neither this package nor JAX."""
    done = forked.run(forked.script_without_us, [script], command_environment(), timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture
def one_device():
    mesh = make_mesh(devices=jax.devices()[:1])
    with jax.set_mesh(mesh):
        yield mesh


@pytest.fixture
def first_device_alone(monkeypatch):
    """What trains or searches has one device: programs for eight take longer to compile."""
    monkeypatch.setattr("prefixmem_jax.parallel.mesh.all_devices", lambda: jax.devices()[:1])


@pytest.fixture
def one_device_elsewhere(monkeypatch):
    """Processes that this one starts have one device, as those of commands."""
    monkeypatch.setenv("XLA_FLAGS", QUICK)


@pytest.fixture
def refused(capsys):
    """Calls a command line that has to end with one line of a mistake, and returns that line.

    In this process: nothing is started before a mistake is found.
    """

    def call(*arguments: object) -> str:
        capsys.readouterr()
        assert cli.main([str(argument) for argument in arguments]) == 2
        said = capsys.readouterr().err
        assert said.startswith("prefixmem") and said.count("\n") == 1, said
        return said

    return call


@contextlib.contextmanager
def mounted(folder: Path, options: str):
    """A file system of its own, or skips the test where mounting is not permitted."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
    if os.geteuid() or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("needs to mount a file system")
    try:
        yield
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def real_data(name: str) -> Path:
    """A folder of ../shared/data, or skips the test where it is absent."""
    folder = DATA / name
    if not folder.is_dir():
        pytest.skip(f"needs {folder}")
    return folder


@pytest.fixture
def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]
