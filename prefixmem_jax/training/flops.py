"""Floating-point operations of a traced function, counted from its matrix products."""

from __future__ import annotations

import math
from typing import Any

from jax.extend import core


def matmul_flops(traced: core.ClosedJaxpr) -> int:
    """FLOPs of all `dot_general`s in a call, on all devices, loops included (2 per multiply-add).

    Of a `cond` the branch with the most counts.
    """
    return _count(traced.jaxpr)


def _count(jaxpr: Any) -> int:
    total = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            left, out = equation.invars[0].aval, equation.outvars[0].aval
            total += 2 * math.prod(out.shape) * math.prod(left.shape[i] for i in contracted)
        counts = [_count(sub) for sub in _subjaxprs(equation.params)]
        # Of a choice, such as one by platform, one branch is run; count the dearest.
        inner = max(counts) if equation.primitive.name == "cond" else sum(counts)
        repeated = equation.params.get("length", 1)  # a scan's
        if equation.primitive.name == "shard_map":  # what one device computes
            repeated = equation.params["mesh"].size
        total += inner * repeated
    return total


def _subjaxprs(params: dict[str, Any]) -> list[Any]:
    inner = []
    for value in params.values():
        for item in value if isinstance(value, (tuple, list)) else (value,):
            if isinstance(item, core.ClosedJaxpr):
                inner.append(item.jaxpr)
            elif isinstance(item, core.Jaxpr):
                inner.append(item)
    return inner
