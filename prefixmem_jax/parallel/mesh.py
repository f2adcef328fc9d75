"""Processes, and the device mesh that they share."""

from __future__ import annotations

import math
import os
import sys
import time
from collections.abc import Sequence

import jax
import numpy as np
from jax.experimental import mesh_utils, multihost_utils
from jax.sharding import AxisType, Mesh

from prefixmem_jax.config_groups import MeshConfig
from prefixmem_jax.errors import UserError
from prefixmem_jax.parallel.rendezvous import meet

AXES = ("data", "fsdp", "tensor")
SECONDS_TO_JOIN = 300
SECONDS_TO_SPEAK = 2
# At the end the others wait for the first process, which writes and compares what came of it.
SECONDS_TO_END = 24 * 3600


def initialize_processes() -> None:
    """Joins the other processes of a distributed run; call before anything touches a device.

    `launch/local.sh` names the coordinator in PREFIXMEM_COORDINATOR, PREFIXMEM_PROCESSES and
    PREFIXMEM_PROCESS_ID. Without them JAX tells what a TPU pod, Slurm, GKE or MPI has set up. All
    meet before JAX starts, which would wait beyond the reach of exceptions and name nobody.

    Raises:
      UserError: the processes are described wrongly or not at all, or not all of them came.
    """
    address, processes, number, devices = _described() or _detected()
    host, _, port = address.rpartition(":")
    meet(host.strip("[]"), int(port), processes, number, SECONDS_TO_JOIN)
    jax.distributed.initialize(
        address, processes, number, devices, shutdown_timeout_seconds=SECONDS_TO_END
    )


def leave(status: int) -> None:
    """Ends this process, one of several, without waiting for the others as JAX would.

    With the first process the coordinator ends, and JAX ends whoever is left: where all have failed
    alike they are given the time to say so.
    """
    if not jax.distributed.is_initialized():
        return
    from jax._src.distributed import global_state  # jax.process_index() waits for all devices

    if global_state.process_id == 0:
        time.sleep(SECONDS_TO_SPEAK)
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(status)


def _described() -> tuple[str, int, int, None] | None:
    """The coordinator, how many processes there are, and which this is, as the environment says."""
    names = ("PREFIXMEM_COORDINATOR", "PREFIXMEM_PROCESSES", "PREFIXMEM_PROCESS_ID")
    given = [os.environ.get(name) or "" for name in names]
    if not any(given):
        return None
    if not all(given):
        missing = ", ".join(n for n, v in zip(names, given, strict=True) if not v)
        raise UserError(f"--distributed: {missing} is not set; set all of {', '.join(names)}")
    address, *counts = given
    host, _, port = address.rpartition(":")
    if not (host and port.isdecimal() and 0 < int(port) < 1 << 16):
        raise UserError(f"{names[0]}={address}: expected HOST:PORT")
    processes = _number(names[1], counts[0], 1, None)
    return address, processes, _number(names[2], counts[1], 0, processes - 1), None


def _detected() -> tuple[str, int, int, Sequence[int] | None]:
    """The same, as JAX reads it from the cluster, and which local devices this process has."""
    from jax._src.clusters import ClusterEnv  # what jax.distributed.initialize asks; not public

    where = os.environ.get("JAX_COORDINATOR_ADDRESS")
    try:
        found = ClusterEnv.auto_detect_unset_distributed_params(
            where, None, None, None, None, SECONDS_TO_JOIN
        )
    except (ValueError, RuntimeError, OSError) as error:
        reason = str(error).partition("\n")[0]
        raise UserError(f"--distributed: JAX cannot tell who the others are ({reason})") from None
    if None in found[:3]:
        raise UserError(
            "--distributed: no TPU pod, Slurm, GKE or MPI here; use launch/local.sh, or set "
            "PREFIXMEM_COORDINATOR"
        )
    return found


def _number(name: str, text: str, least: int, most: int | None) -> int:
    """A whole number from the environment."""
    number = int(text) if text.isdecimal() and len(text) < 10 else -1
    if number < least or (most is not None and number > most):
        upto = "or more" if most is None else f"to {most}"
        raise UserError(f"{name}={text}: expected a whole number, {least} {upto}")
    return number


def all_devices() -> list[jax.Device]:
    """The devices of all processes.

    Raises:
      UserError: this machine has none of the kind that is asked for.
    """
    try:
        return jax.devices()
    except (RuntimeError, AssertionError) as error:  # JAX asserts that it has CUDA
        asked = jax.config.jax_platforms
        reason = (str(error).splitlines() or ["not installed"])[0].partition(" (set ")[0]
        raise UserError(f"JAX_PLATFORMS={asked}: no such device here ({reason})") from None


def all_agree(flag: bool) -> bool:
    """The first process's flag, on every process: they must take the same way."""
    if jax.process_count() == 1:
        return flag
    return bool(multihost_utils.broadcast_one_to_all(np.array(flag)))


def mesh_shape(config: MeshConfig, devices: int) -> tuple[int, int, int]:
    """Sizes of the axes `data`, `fsdp`, `tensor`, with -1 filled in.

    Raises:
      UserError: the sizes do not multiply to the number of devices.
    """
    sizes = [config.data, config.fsdp, config.tensor]
    if sizes.count(-1) > 1 or any(size < 1 and size != -1 for size in sizes):
        raise UserError(f"mesh: sizes are 1 or more, at most one -1 (the rest); got {sizes}")
    known = math.prod(size for size in sizes if size != -1)
    if devices % known or (-1 not in sizes and known != devices):
        stated = ", ".join(f"{axis}={size}" for axis, size in zip(AXES, sizes, strict=True))
        raise UserError(f"mesh: {stated} does not fit {devices} devices")
    return tuple(devices // known if size == -1 else size for size in sizes)


def make_mesh(
    config: MeshConfig | None = None, devices: Sequence[jax.Device] | None = None
) -> Mesh:
    """The explicit-mode mesh over all devices of all processes (or the given ones).

    Devices of several TPU slices are laid out so that only `data` crosses between slices.
    """
    devices = all_devices() if devices is None else devices
    shape = mesh_shape(config or MeshConfig(), len(devices))
    types = (AxisType.Explicit,) * len(AXES)
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    if shape[0] % slices:
        raise UserError(f"mesh: data={shape[0]} does not divide by the {slices} slices")
    within = (shape[0] // slices, *shape[1:])
    # A mesh axis may be a piece of one of the pod's, such as fsdp=8 of 4x4 chips.
    options = {"devices": devices, "allow_split_physical_axes": True}
    try:
        if slices == 1:
            grid = mesh_utils.create_device_mesh(within, **options)
        else:
            grid = mesh_utils.create_hybrid_device_mesh(within, (slices, 1, 1), **options)
    except (NotImplementedError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"mesh: {shape} does not lie on these chips ({reason})") from None
    return Mesh(np.asarray(grid), AXES, axis_types=types)
