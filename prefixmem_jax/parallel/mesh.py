"""Processes, the device mesh, and how arrays lie on it.

The batch and the memory table's rows are sharded over the mesh; dense parameters are on every
device.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

import jax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from prefixmem_jax.errors import UserError

DATA_AXIS = "data"


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


def make_mesh(devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Devices (default: all of all processes) on one explicit-mode axis."""
    devices = jax.devices() if devices is None else devices
    return jax.make_mesh((len(devices),), (DATA_AXIS,), devices=devices)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, P(DATA_AXIS))


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, P())
