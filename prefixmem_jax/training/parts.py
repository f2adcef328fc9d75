"""A train state as checkpoint parts, and back.

Beside the model's own parts, a checkpoint of a run in training has `optimizer`,
`memory_optimizer`, `step` (the number of updates), and where parameters are averaged the average of
each dense part, such as `average_llm`.
"""

from __future__ import annotations

from typing import Any

from prefixmem_jax.model_spec import ModelSpec
from prefixmem_jax.runs.checkpoint import abstract_memory_part, averaged, memory_part
from prefixmem_jax.training.state import TrainState, abstract_state


def to_parts(spec: ModelSpec, state: TrainState) -> dict[str, Any]:
    """A real state as checkpoint parts."""
    return _to_parts(state, None if state.memory is None else memory_part(spec, state.memory))


def abstract_parts(spec: ModelSpec) -> dict[str, Any]:
    """The parts that `to_parts` gives, abstract."""
    memory = None if spec.table is None else abstract_memory_part(spec)
    return _to_parts(abstract_state(spec), memory)


def _to_parts(state: TrainState, memory: dict[str, Any] | None) -> dict[str, Any]:
    parts = {**state.params, "optimizer": state.optimizer, "step": {"count": state.step}}
    if state.average is not None:
        parts |= {averaged(part): tree for part, tree in state.average.items()}
    if memory is not None:
        parts |= {"memory": memory, "memory_optimizer": state.memory_optimizer}
    return parts


def from_parts(parts: dict[str, Any]) -> TrainState:
    """The inverse of `to_parts`."""
    others = ("optimizer", "memory", "memory_optimizer", "step")
    averages = {averaged(name): name for name in parts if averaged(name) in parts}
    average = {name: parts[saved] for saved, name in averages.items()}
    return TrainState(
        parts["step"]["count"],
        {name: tree for name, tree in parts.items() if name not in (*others, *averages)},
        parts["optimizer"],
        parts["memory"]["rows"] if "memory" in parts else None,
        parts.get("memory_optimizer"),
        average or None,
    )
