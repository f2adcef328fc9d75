"""Programs that were compiled once are there for the next process."""

from __future__ import annotations

import hashlib
import os
import platform
from pathlib import Path

import jax

# In all; those that were used longest ago make room.
MOST_BYTES = 2 << 30


def keep_compiled_programs() -> None:
    """Names a folder for JAX's compilation cache, where JAX_COMPILATION_CACHE_DIR names none.

    It is in the user's cache folder. Where that cannot be written, nothing is kept.
    """
    if jax.config.jax_compilation_cache_dir:
        return
    try:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        folder = folder / "prefixmem_jax" / f"programs-{_processor()}"
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError):  # the latter: there is no home
        return
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_compilation_cache_max_size", MOST_BYTES)


def _processor() -> str:
    """What this processor can do: what is compiled for it does not run on one that can do less."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    can = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    about = f"{platform.machine()} {platform.processor()} {can}"
    return hashlib.sha256(about.encode()).hexdigest()[:12]
