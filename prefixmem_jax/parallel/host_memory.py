"""How the process gets its memory from the operating system, where steps compute in that."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

# Parameters of glibc's mallopt, from malloc.h.
TRIM_THRESHOLD, MMAP_MAX, ARENA_MAX = -1, -4, -8
MOST = 2**31 - 1
# Where the kernel shows GPUs and TPUs.
ACCELERATORS = ("nvidia0", "kfd", "accel0", "vfio/0")


def keep_freed_memory() -> bool:
    """Has the process keep memory that it freed, where it computes on CPUs; before JAX has devices.

    A program of XLA allocates what it computes in each time it runs. glibc gives pieces of that
    size back when they are freed, so that every step takes its memory page by page anew: a quarter
    of a small decoder's step. What a process has had at most is then its own until it ends.

    Returns:
      Whether it does: not with an accelerator, nor without glibc.
    """
    if not computes_on_cpus():
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # another C library
        return False
    # Arenas of threads cannot hold what is large: one for all.
    settings = ((MMAP_MAX, 0), (TRIM_THRESHOLD, MOST), (ARENA_MAX, 1))
    return all([mallopt(*setting) for setting in settings])


def computes_on_cpus() -> bool:
    """Whether JAX will, as far as the environment and the devices that are there say."""
    platforms = os.environ.get("JAX_PLATFORMS")
    if platforms:
        return platforms == "cpu"
    return not any(Path("/dev", name).exists() for name in ACCELERATORS)
