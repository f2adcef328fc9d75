"""Where else a run's records are shown, beside metrics.jsonl: TensorBoard, and Weights & Biases."""

from __future__ import annotations

import json
import logging
import secrets
import sys
from importlib.util import find_spec
from pathlib import Path

from tensorboardX import SummaryWriter

from prefixmem_jax.config import Config
from prefixmem_jax.config_files import to_json
from prefixmem_jax.errors import UserError
from prefixmem_jax.files import read_json_object, write_json

log = logging.getLogger(__name__)

# In a run: which one it is to Weights & Biases.
WANDB = "wandb.json"


def check_boards(config: Config) -> None:
    """Raises UserError where a config wants one that is not installed."""
    if config.wandb is not None and find_spec("wandb") is None:
        raise UserError(f"wandb={config.wandb}: needs wandb: pip install '.[wandb]'")


class TensorBoard:
    """Event files in `folder`/tensorboard; what was shown after `resume_step` is taken back."""

    def __init__(self, folder: Path, resume_step: int):
        self._writer = SummaryWriter(str(folder / "tensorboard"), purge_step=resume_step + 1)

    def write(self, step: int, record: dict[str, float]) -> None:
        for name, value in record.items():
            self._writer.add_scalar(name, value, step)

    def flush(self) -> None:
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class WeightsAndBiases:
    """A run there with the config of ours, under the same number whenever this one goes on.

    What a killed run showed after its last checkpoint is shown once: the same step has the same
    numbers. Its own settings (WANDB_MODE=offline, WANDB_API_KEY, ...) hold.
    """

    def __init__(self, run: Path, folder: Path, config: Config):
        """Starts it.

        Args:
          folder: of this machine; it keeps its files there, in `wandb/`.

        Raises:
          UserError: it cannot, as where nobody is logged in.
        """
        import wandb

        try:
            self._run = wandb.init(
                project=config.wandb,
                name=run.name,
                id=_number_there(run, config.wandb),
                resume="allow",
                dir=str(folder),
                config=json.loads(to_json(config)),
                settings=wandb.Settings(silent=True, console="off"),
            )
        except wandb.Error as error:
            reason = str(error).partition("\n")[0]
            raise UserError(f"wandb={config.wandb}: {reason}") from None
        if not self._run.offline and not self._run.disabled:
            log.info(f"Weights & Biases: {self._run.url}")

    def write(self, step: int, record: dict[str, float]) -> None:
        self._run.log(record, step=step)

    def flush(self) -> None:
        """It sends by itself."""

    def close(self) -> None:
        failed = sys.exc_info()[0] is not None  # the training is being left by an exception
        self._run.finish(exit_code=int(failed))


def _number_there(run: Path, project: str) -> str:
    """The number that this run has in a project, made up the first time."""
    path = run / WANDB
    known = read_json_object(path) if path.exists() else {}
    if project not in known:
        known[project] = secrets.token_hex(8)
        write_json(path, known)
    return known[project]
