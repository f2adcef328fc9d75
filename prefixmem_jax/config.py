"""One training run as a frozen dataclass: every group of keys that a config file may set.

`config_groups` documents the plain groups; objectives and SID encoders, which come in kinds,
document their own keys (`objectives/`, `sid_encoders/`). `config_files` loads, overrides and saves
configs.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from pydantic import PositiveInt, with_config

from prefixmem_jax.config_groups import (
    CheckpointConfig,
    DataConfig,
    DecoderConfig,
    EvaluationConfig,
    InitConfig,
    ItemHeadConfig,
    MeshConfig,
    OptimizerConfig,
    Seed,
)
from prefixmem_jax.errors import UserError
from prefixmem_jax.kinds import STRICT
from prefixmem_jax.objectives.next_token import NextToken
from prefixmem_jax.objectives.objective import Objective
from prefixmem_jax.sid_encoders.sid_encoder import SidEncoderConfig


@with_config(STRICT)
@dataclass(frozen=True)
class Config:
    """One training run of one objective (a stage).

    Attributes:
      objective: what the run learns: `next_token` trains the decoder, with the SID encoder if there
        is one (stage 2, baseline); `classification` the SID encoder alone (stage 1); `tiger` an
        encoder-decoder of `model`'s shape, with the SID encoder or without; `rq_vae`, which
        `prefixmem sids` trains, an autoencoder of items' vectors.
      wandb: the project of Weights & Biases that shows the run's records too, or none.
      sid_encoder: what is added to the input embedding at SID positions, or none.
      item_head: what scores whole items beside their codes, or none.
    """

    name: str
    objective: Objective = field(default_factory=NextToken)
    steps: PositiveInt = 1000
    seed: Seed = 0
    log_every_steps: PositiveInt = 10
    wandb: str | None = None
    data: DataConfig = field(default_factory=DataConfig)
    model: DecoderConfig = field(default_factory=DecoderConfig)
    sid_encoder: SidEncoderConfig | None = None
    item_head: ItemHeadConfig | None = None
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    init: InitConfig = field(default_factory=InitConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)

    def check(self) -> None:
        """Raises UserError where keys contradict each other; single keys are checked on loading."""
        self.data.synthetic.check()
        self.model.check()
        if self.sid_encoder is not None:
            self.sid_encoder.check_keys()
        elif self.optimizer.trainable == "sid_encoder":
            raise UserError(
                "optimizer.trainable=sid_encoder trains the SID encoder alone, and sid_encoder is "
                "none"
            )
        if self.item_head is not None:
            self.item_head.check(self.sid_encoder is not None and self.sid_encoder.reads_items)
            if self.item_head.negatives and getattr(self.sid_encoder, "items", 0) > 1:
                # The target would be read with the items before it, the others without.
                raise UserError(
                    f"item_head.negatives={self.item_head.negatives}: expected none, or "
                    f"sid_encoder.items of 1 at most, not {self.sid_encoder.items}"
                )
        if self.evaluation.patience and self.evaluation.select_by is None:
            raise UserError("evaluation.patience needs a metric to wait for: evaluation.select_by")
        if self.evaluation.retrieves and not self.objective.generates:
            raise UserError(
                f"evaluation.select_by={self.evaluation.select_by}: this objective's model "
                "recommends nothing; expected loss"
            )
        self.objective.check(self)
