"""What a run records: metrics.jsonl and boards, in step with the checkpoints."""

from __future__ import annotations

import json
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

from prefixmem_jax.config import Config
from prefixmem_jax.errors import UserError
from prefixmem_jax.files import write_text
from prefixmem_jax.runs.boards import TensorBoard, WeightsAndBiases
from prefixmem_jax.storage import files_below, is_remote, upload

METRICS = "metrics.jsonl"
# Seconds between two copies of what is recorded to a remote run.
COPY_SECONDS = 60


def read_metrics(run: Path) -> list[dict[str, float]]:
    """The records of a run's metrics.jsonl, oldest first, without what a kill cut short.

    Raises:
      UserError: a line that is no record; names it.
    """
    path = run / METRICS
    text = path.read_bytes().decode(errors="replace") if path.exists() else ""
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
    """Appends records to metrics.jsonl and shows them on boards; the first process only.

    Records after `resume_step` are dropped first: a killed run may have logged steps beyond its
    last checkpoint, and will log them again.
    """

    def __init__(self, run: Path, resume_step: int, config: Config):
        kept = [record for record in read_metrics(run) if record["step"] <= resume_step]
        write_text(run / METRICS, "".join(json.dumps(r) + "\n" for r in kept))
        self._open = ExitStack()
        self._run = self._folder = run
        if is_remote(run):  # whose files cannot be appended to
            self._folder = Path(self._open.enter_context(tempfile.TemporaryDirectory()))
            write_text(self._folder / METRICS, (run / METRICS).read_text())
        self._copied = time.monotonic()
        self._file = self._open.enter_context((self._folder / METRICS).open("a"))
        self._boards = [TensorBoard(self._folder, resume_step)]
        if config.wandb is not None:
            self._boards.append(WeightsAndBiases(run, self._folder, config))

    def write(self, step: int, record: dict[str, float]) -> None:
        self._file.write(json.dumps({"step": step, **record}) + "\n")
        self._file.flush()
        for board in self._boards:
            board.write(step, record)
        if time.monotonic() - self._copied > COPY_SECONDS:
            self.publish()

    def publish(self) -> None:
        """Brings all that was written so far to where the run lies."""
        for board in self._boards:
            board.flush()
        if is_remote(self._run):
            for path in files_below(self._folder):
                upload(path, self._run / path.relative_to(self._folder))
        self._copied = time.monotonic()

    def close(self) -> None:
        for board in self._boards:
            board.close()
        self.publish()
        self._open.close()
