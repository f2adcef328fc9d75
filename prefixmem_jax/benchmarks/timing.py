"""Timing for comparisons: everything in turn within one process, so that noise hits all alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import jax
from tqdm import tqdm

from prefixmem_jax.page import figure

BLOCK = 4  # calls in a row; the first, which finds another call's data in the caches, is dropped


def median_seconds(
    calls: dict[Any, Callable[[], Any]], repeats: int, describe: str
) -> dict[Any, float]:
    """Median seconds of each call, in blocks that take turns.

    Args:
      calls: functions without arguments; what they return is waited for.
      repeats: timed calls of each, rounded up to whole blocks; one more block warms up.
    """
    times: dict[Any, list[float]] = {name: [] for name in calls}
    blocks = 1 + -(-repeats // (BLOCK - 1))
    with tqdm(total=blocks * BLOCK * len(calls), desc=describe, leave=False) as bar:
        for block in range(blocks):
            for name, call in calls.items():
                for number in range(BLOCK):
                    started = time.perf_counter()
                    jax.block_until_ready(call())
                    if block and number:
                        times[name].append(time.perf_counter() - started)
                    bar.update()
    return {name: statistics.median(seconds) for name, seconds in times.items()}


def in_its_own_process(function: Callable[..., Any], *arguments: Any) -> Any:
    """What a function gives in a fresh process: what this one has had in memory must not count."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def machine() -> dict[str, Any]:
    """What the numbers were measured on."""
    device = jax.devices()[0]
    return {
        "platform": device.platform,
        "device": device.device_kind,
        "devices": jax.device_count(),
        "jax": jax.__version__,
    }


def bar_plot(path: Path, panels: Sequence[tuple[str, dict[str, float]]]) -> None:
    """One panel of horizontal bars per (title with the unit, numbers by name)."""
    with figure(path, 4.5 * len(panels), 2.6) as drawn:
        axes = drawn.subplots(1, len(panels), squeeze=False)
        for axis, (title, values) in zip(axes[0], panels, strict=True):
            bars = axis.barh(list(values), list(values.values()))
            axis.bar_label(bars, fmt="%.4g", padding=2)
            axis.set(title=title)
            axis.margins(x=0.2)
            axis.invert_yaxis()
