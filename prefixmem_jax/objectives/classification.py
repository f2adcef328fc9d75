"""Next-code classification by the SID encoder alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from prefixmem_jax.errors import UserError
from prefixmem_jax.objectives.objective import Objective

if TYPE_CHECKING:
    from prefixmem_jax.config import Config


@dataclass(frozen=True)
class Classification(Objective):
    """Trains the SID encoder alone to predict each next code (stage 1)."""

    def check(self, config: Config) -> None:
        if config.sid_encoder is None:
            raise UserError(
                "objective=classification trains the SID encoder, and sid_encoder is none"
            )
