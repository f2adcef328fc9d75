"""What a training left, to be compared with what another one left."""

from pathlib import Path
from typing import Any

import jax

from prefixmem_jax.runs.metrics import read_metrics
from prefixmem_jax.runs.run import Run
from prefixmem_jax.training.parts import abstract_parts, from_parts
from prefixmem_jax.training.state import TrainState


def state_of(folder: str | Path) -> tuple[int, TrainState, Any]:
    """Step, state and data state of a run's newest checkpoint, on the host."""
    run = Run(folder)
    spec = run.spec(jax.devices()[:1])
    with run.checkpoints() as checkpoints:
        step = checkpoints.choose()
        state = from_parts(checkpoints.load(abstract_parts(spec), spec, step))
        return step, jax.device_get(state), checkpoints.metadata(step)["data_iterator"]


def records_of(folder: Path) -> list[dict[str, float]]:
    """What a run recorded, but for how long it took."""
    return [
        {
            name: value
            for name, value in record.items()
            if not name.endswith(("seconds", "_per_second"))
        }
        for record in read_metrics(folder)
    ]
