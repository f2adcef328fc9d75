"""The space of Semantic IDs: how many levels, and how many codes on each."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class SidSpace:
    """Codebook sizes by level. Levels are counted from 1, as in the paper; codes from 0."""

    codebook_sizes: tuple[int, ...]

    @property
    def levels(self) -> int:
        return len(self.codebook_sizes)
