"""One training run as a frozen dataclass: every group of keys that a config file may set.

`config_groups` documents the plain groups; objectives and SID encoders, which come in kinds,
document their own keys (`objectives/`, `sid_encoders/`). `config_files` loads, overrides and saves
configs.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from prefixmem_jax.config_groups import (
    CheckpointConfig,
    DataConfig,
    DecoderConfig,
    EvaluationConfig,
    InitConfig,
    MeshConfig,
    OptimizerConfig,
)
from prefixmem_jax.objectives.next_token import NextToken
from prefixmem_jax.objectives.objective import Objective
from prefixmem_jax.sid_encoders.sid_encoder import SidEncoderConfig


@dataclass(frozen=True)
class Config:
    """One training run of one objective (a stage).

    Attributes:
      objective: what the run learns: `next_token` trains the decoder, with the SID encoder if there
        is one (stage 2, baseline); `classification` the SID encoder alone (stage 1).
      sid_encoder: what is added to the input embedding at SID positions, or none.
    """

    name: str
    objective: Objective = field(default_factory=NextToken)
    steps: int = 1000
    seed: int = 0
    log_every_steps: int = 10
    data: DataConfig = field(default_factory=DataConfig)
    model: DecoderConfig = field(default_factory=DecoderConfig)
    sid_encoder: SidEncoderConfig | None = None
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    init: InitConfig = field(default_factory=InitConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
