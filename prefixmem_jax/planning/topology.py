"""TPU pods that a program can be compiled for without having one."""

from __future__ import annotations

import importlib.util
import itertools
import operator
import os
import re
from dataclasses import dataclass

import jax

from prefixmem_jax.errors import UserError
from prefixmem_jax.parallel.tpu_flags import set_tpu_flags
from prefixmem_jax.training.flops import PEAK_FLOPS


@dataclass(frozen=True)
class Chip:
    """Published peak rates of one chip, and the memory that the compiler may use.

    Attributes:
      hbm_bytes: usable main memory.
      flops: bfloat16 FLOP/s.
      hbm_bandwidth: bytes/s.
      network_bandwidth: bytes/s over all links between chips.
      clock: cycles a second, of the matrix units that make up `flops`.
    """

    hbm_bytes: int
    flops: float
    hbm_bandwidth: float
    network_bandwidth: float
    clock: float


_GIB = 2**30
# cloud.google.com/tpu/docs/v5e, v5p, v6e; memory as the compiler states it.
CHIPS = {
    "v5e": Chip(int(15.75 * _GIB), PEAK_FLOPS["TPU v5 lite"], 819e9, 200e9, 1.5e9),
    "v5p": Chip(int(95.74 * _GIB), PEAK_FLOPS["TPU v5"], 2765e9, 600e9, 1.75e9),
    "v6e": Chip(int(31.25 * _GIB), PEAK_FLOPS["TPU v6 lite"], 1640e9, 448e9, 1.75e9),
}


def pod_devices(topology: str, slices: int = 1) -> tuple[Chip, list[jax.Device]]:
    """Devices of a pod to compile for, such as `v5e:16x16` or `v5p:4x4x8`.

    Raises:
      UserError: the name is unknown, or the TPU compiler is not installed.
    """
    name, _, shape = topology.partition(":")
    dimensions = 3 if name == "v5p" else 2
    if name not in CHIPS or not re.fullmatch(rf"\d+(x\d+){{{dimensions - 1}}}", shape):
        raise UserError(
            f"--topology {topology}: expected one of {', '.join(CHIPS)} and a shape, such as "
            "v5e:16x16, v6e:8x8 or v5p:4x4x4"
        )
    if importlib.util.find_spec("libtpu") is None:
        raise UserError(
            "--topology needs the TPU compiler: pip install '.[tpu]' in the repository (no TPU "
            "needed)"
        )
    # Nothing is to be asked of a cloud machine's metadata: there is no TPU here.
    for key, value in {
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_ACCELERATOR_TYPE": f"{name}-1",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_MIN_LOG_LEVEL": "3",
        # The compiler takes the chips' lock, and uses none.
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    }.items():
        os.environ.setdefault(key, value)
    set_tpu_flags(name)
    from jax.experimental import topologies

    options = {"num_slices": slices} if slices > 1 else {}
    try:
        described = topologies.get_topology_desc(platform="tpu", topology_name=topology, **options)
    except (RuntimeError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"--topology {topology}: not a pod that exists ({reason})") from None
    return CHIPS[name], list(described.devices)


def mean_hops(topology: str) -> float:
    """Links that a message between two random chips of the pod's torus crosses, on average."""
    return sum(max(int(n), 1) / 4 for n in topology.partition(":")[2].split("x"))


def link_share(topology: str, devices: int) -> float:
    """Share of a chip's links that so many devices use that exchange along a ring.

    They are taken to lie along as few of the pod's axes as hold them.
    """
    sizes = sorted((int(n) for n in topology.partition(":")[2].split("x")), reverse=True)
    held = itertools.accumulate(sizes, operator.mul)
    used = next((axes for axes, size in enumerate(held, 1) if size >= devices), len(sizes))
    return used / len(sizes)


def simulate_cpu_devices(devices: int) -> None:
    """Divides this machine's CPU into so many devices, if JAX uses it; before anything else."""
    jax.config.update("jax_num_cpu_devices", devices)


def use_cpu(devices: int = 1) -> None:
    """Keeps JAX to this machine's CPU, divided into so many devices; before anything else."""
    jax.config.update("jax_platforms", "cpu")
    simulate_cpu_devices(devices)
