"""Floating-point operations of a traced function, counted from its matrix products."""

from __future__ import annotations

import math
from typing import Any

import jax
from jax.extend import core
from jax.interpreters.partial_eval import dce_jaxpr

from prefixmem_jax.layers import fixed_products

# bfloat16 FLOP/s without sparsity, as published (cloud.google.com/tpu/docs, nvidia.com), by the
# beginning of what JAX calls a device.
PEAK_FLOPS = {
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5": 459e12,
    "TPU v6 lite": 918e12,
    "NVIDIA A100": 312e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H200": 989e12,
}


def peak_flops(device: jax.Device) -> float | None:
    """A device's published bfloat16 FLOP/s; None where they are not known, as of CPUs."""
    names = [name for name in PEAK_FLOPS if device.device_kind.startswith(name)]
    return PEAK_FLOPS[max(names, key=len)] if names else None


def matmul_flops(traced: core.ClosedJaxpr) -> int:
    """FLOPs of all `dot_general`s in a call, on all devices, loops included (2 per multiply-add).

    But of products with constants, which only TPUs have in place of sums (`layers.fixed_products`).
    Of a `cond` the branch with the most counts; of a kernel all blocks of its grid. What no result
    needs does not count, as the compiler leaves it out: kernels whose results were kept.
    """
    return _count(_needed(traced), counts=True)


def kernel_flops(traced: core.ClosedJaxpr) -> int:
    """As `matmul_flops`, of what kernels compute alone."""
    return _count(_needed(traced), counts=False)


def _needed(traced: core.ClosedJaxpr) -> Any:
    return dce_jaxpr(traced.jaxpr, [True] * len(traced.jaxpr.outvars))[0]


def _count(jaxpr: Any, counts: bool) -> int:
    """
    Args:
      counts: whether products count that are not in a kernel.
    """
    total = 0
    for equation in jaxpr.eqns:
        primitive = equation.primitive.name
        if primitive == "dot_general" and counts and not _is_fixed(equation):
            (contracted, _), _ = equation.params["dimension_numbers"]
            left, out = equation.invars[0].aval, equation.outvars[0].aval
            total += 2 * math.prod(out.shape) * math.prod(left.shape[i] for i in contracted)
        is_kernel = primitive == "pallas_call"
        found = [_count(sub, counts or is_kernel) for sub in _subjaxprs(equation.params)]
        # Of a choice, such as one by platform, one branch is run; count the dearest.
        inner = max(found) if primitive == "cond" else sum(found)
        repeated = equation.params.get("length", 1)  # a scan's
        if primitive == "shard_map":  # what one device computes
            repeated = equation.params["mesh"].size
        elif is_kernel:
            repeated = math.prod(equation.params["grid_mapping"].grid)
        total += inner * repeated
    return total


def _is_fixed(equation: Any) -> bool:
    return fixed_products.SCOPE in str(equation.source_info.name_stack)


def _subjaxprs(params: dict[str, Any]) -> list[Any]:
    inner = []
    for value in params.values():
        for item in value if isinstance(value, (tuple, list)) else (value,):
            if isinstance(item, core.ClosedJaxpr):
                inner.append(item.jaxpr)
            elif isinstance(item, core.Jaxpr):
                inner.append(item)
    return inner
