"""What a stage learns."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from prefixmem_jax.kinds import Kind

if TYPE_CHECKING:
    from prefixmem_jax.config import Config


@dataclass(frozen=True)
class Objective(Kind):
    """Base of objectives' config groups."""

    package: ClassVar[str] = "prefixmem_jax.objectives"

    def check(self, config: Config) -> None:
        """Raises UserError where the config does not fit it."""
