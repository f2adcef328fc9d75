"""What a run records: metrics.jsonl and TensorBoard, in step with the checkpoints."""

from __future__ import annotations

import json
from pathlib import Path

from tensorboardX import SummaryWriter

from prefixmem_jax.errors import UserError
from prefixmem_jax.files import write_text

METRICS = "metrics.jsonl"


def read_metrics(run: Path) -> list[dict[str, float]]:
    """The records of a run's metrics.jsonl, oldest first, without what a kill cut short.

    Raises:
      UserError: a line that is no record; names it.
    """
    path = run / METRICS
    text = path.read_text(errors="replace") if path.exists() else ""
    records = []
    for number, line in enumerate(text.splitlines(keepends=True), start=1):
        if not line.endswith("\n"):
            break
        try:
            record = json.loads(line)
            record["step"] += 0
        except (ValueError, TypeError, KeyError):
            raise UserError(f"{path}: line {number} is no record; repair or remove it") from None
        records.append(record)
    return records


class MetricsWriter:
    """Appends records to metrics.jsonl and TensorBoard; the first process only.

    Records after `resume_step` are dropped first: a killed run may have logged steps beyond its
    last checkpoint, and will log them again.
    """

    def __init__(self, run: Path, resume_step: int):
        kept = [record for record in read_metrics(run) if record["step"] <= resume_step]
        write_text(run / METRICS, "".join(json.dumps(r) + "\n" for r in kept))
        self._file = (run / METRICS).open("a")
        self._board = SummaryWriter(str(run / "tensorboard"), purge_step=resume_step + 1)

    def write(self, step: int, record: dict[str, float]) -> None:
        self._file.write(json.dumps({"step": step, **record}) + "\n")
        self._file.flush()
        for name, value in record.items():
            self._board.add_scalar(name, value, step)

    def close(self) -> None:
        self._file.close()
        self._board.close()
