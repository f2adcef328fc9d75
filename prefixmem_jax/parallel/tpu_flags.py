"""What the TPU compiler is asked for, by a run there as by a plan anywhere."""

from __future__ import annotations

import os
from pathlib import Path

_VARIABLE = "LIBTPU_INIT_ARGS"
# Collectives run beside other work. On v5e they are its own choice but for the all-reduce's, on v6e
# nothing is overlapped without them (docs/pods.md).
_FLAGS = (
    "--xla_enable_async_all_gather=true "
    "--xla_enable_async_all_reduce=true "
    "--xla_tpu_overlap_compute_collective_tc=true "
    "--xla_tpu_enable_async_collective_fusion=true "
    "--xla_tpu_enable_async_collective_fusion_multiple_steps=true "
    "--xla_tpu_enable_async_collective_fusion_fuse_all_gather=true "
    "--xla_tpu_enable_async_collective_fusion_fuse_all_reduce="
)
_ON_CORES = f"{_FLAGS}true"
# A v6e has cores apart, for sparse lookups: gradients' sums are left to them.
_ON_SPARSE_CORES = (
    f"{_FLAGS}false "
    "--xla_tpu_enable_sparse_core_collective_offload_all_reduce=true "
    "--xla_tpu_enable_sparse_core_collective_offload_reduce_scatter=true "
    "--xla_tpu_use_tc_device_shape_on_sc=true"
)
# What a chip calls itself on the machine that it is in.
_PCI, _GOOGLE, _V6E = Path("/sys/bus/pci/devices"), "0x1ae0", "0x006f"


def set_tpu_flags(chip: str | None = None) -> None:
    """Sets LIBTPU_INIT_ARGS unless the user has; before JAX is imported, which may add to it.

    Args:
      chip: such as `v6e`, to compile for; by default that of this machine, if it has any.
    """
    found = os.environ.get(_VARIABLE)
    if found is None or found.startswith((_ON_CORES, _ON_SPARSE_CORES)):
        is_v6e = chip == "v6e" if chip else _has_v6e()
        os.environ[_VARIABLE] = _ON_SPARSE_CORES if is_v6e else _ON_CORES


def options_beside_a_host() -> dict[str, str]:
    """For the compilation of a program, on TPUs, that has arrays in the host's memory.

    The compiler counts them as its own: where all would not fit it computes again what it had room
    to keep, or does not compile at all. So it is told of room that it has not.
    """
    return {"xla_jf_rematerialization_percent_shared_memory_limit": "1000"}


def _has_v6e() -> bool:
    vendors = _PCI.glob("*/vendor")
    google = [path for path in vendors if path.read_text().strip() == _GOOGLE]
    return any(path.with_name("device").read_text().strip() == _V6E for path in google)
