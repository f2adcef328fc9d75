"""Next-token prediction by the decoder."""

from __future__ import annotations

from dataclasses import dataclass

from prefixmem_jax.objectives.objective import Objective


@dataclass(frozen=True)
class NextToken(Objective):
    """Trains the decoder, with the SID encoder if there is one (stage 2, baseline)."""
