"""Memory that was freed stays the process's own where it computes on CPUs."""

import os
import subprocess
import sys

import pytest

from prefixmem_jax.parallel import host_memory

# How many pages the operating system hands out for an array that takes a freed one's place, as a
# share of what it hands out for the first.
AGAIN = """
import resource, numpy as np
from prefixmem_jax.parallel.host_memory import keep_freed_memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    np.ones(2**24)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

kept = keep_freed_memory()
first, second = faults(), faults()
print(kept, second / first)
"""


def again(platforms: str) -> tuple[bool, float]:
    environment = {**os.environ, "JAX_PLATFORMS": platforms, "NUMPY_MADVISE_HUGEPAGE": "0"}
    command = [sys.executable, "-c", AGAIN]
    done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    kept, share = done.stdout.split()
    return kept == "True", float(share)


def test_on_cpus_freed_memory_is_used_again():
    kept, share = again("cpu")
    if not kept:
        pytest.skip("not glibc")
    assert share < 0.1


def test_with_an_accelerator_it_goes_back():
    kept, share = again("tpu")
    assert not kept and share > 0.5


def test_an_accelerator_is_seen_where_nothing_names_a_platform(monkeypatch):
    monkeypatch.delenv("JAX_PLATFORMS")
    monkeypatch.setattr(host_memory, "ACCELERATORS", ("null",))
    assert not host_memory.keep_freed_memory()
