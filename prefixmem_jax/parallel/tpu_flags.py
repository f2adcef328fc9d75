"""What the TPU compiler is asked for, by a run there as by a plan anywhere."""

import os

# Collectives run beside other work. On v5e they are its own choice but for the all-reduce's, on v6e
# nothing is overlapped without them (docs/pods.md).
_FLAGS = (
    "--xla_enable_async_all_gather=true",
    "--xla_enable_async_all_reduce=true",
    "--xla_tpu_overlap_compute_collective_tc=true",
    "--xla_tpu_enable_async_collective_fusion=true",
    "--xla_tpu_enable_async_collective_fusion_multiple_steps=true",
    "--xla_tpu_enable_async_collective_fusion_fuse_all_gather=true",
    "--xla_tpu_enable_async_collective_fusion_fuse_all_reduce=true",
)


def set_tpu_flags() -> None:
    """Sets LIBTPU_INIT_ARGS where it is not; before JAX is imported, which may add to it."""
    os.environ.setdefault("LIBTPU_INIT_ARGS", " ".join(_FLAGS))
