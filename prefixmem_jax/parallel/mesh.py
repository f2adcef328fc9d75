"""Processes, and the device mesh that they share."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh

from prefixmem_jax.config_groups import MeshConfig
from prefixmem_jax.errors import UserError

AXES = ("data", "fsdp", "tensor")


def initialize_processes() -> None:
    """Joins the other processes of a distributed run; call before anything touches a device.

    `launch/local.sh` names the coordinator in PREFIXMEM_COORDINATOR, PREFIXMEM_PROCESSES and
    PREFIXMEM_PROCESS_ID. Without them, JAX finds the others itself (TPU pods, Slurm, GKE).
    """
    names = ("PREFIXMEM_COORDINATOR", "PREFIXMEM_PROCESSES", "PREFIXMEM_PROCESS_ID")
    given = [os.environ.get(name) for name in names]
    if all(given):
        jax.distributed.initialize(given[0], int(given[1]), int(given[2]))
        return
    if any(given):
        missing = ", ".join(n for n, v in zip(names, given, strict=True) if not v)
        raise UserError(f"--distributed: {missing} is not set; set all of {', '.join(names)}")
    try:
        jax.distributed.initialize()
    except (ValueError, RuntimeError) as error:
        raise UserError(
            f"--distributed: JAX found no other processes ({str(error).splitlines()[0]}); use "
            "launch/local.sh or launch/tpu_vm.sh"
        ) from None


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
    devices = jax.devices() if devices is None else devices
    shape = mesh_shape(config or MeshConfig(), len(devices))
    types = (AxisType.Explicit,) * len(AXES)
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    if slices == 1:
        return jax.make_mesh(shape, AXES, types, devices=devices)
    if shape[0] % slices:
        raise UserError(f"mesh: data={shape[0]} does not divide by the {slices} slices")
    within = (shape[0] // slices, *shape[1:])
    grid = mesh_utils.create_hybrid_device_mesh(within, (slices, 1, 1), devices=devices)
    return Mesh(np.asarray(grid), AXES, axis_types=types)
