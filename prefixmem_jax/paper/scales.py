"""The sizes at which the paper's tables can be run; what they compare is the same at each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from prefixmem_jax.config import Config
from prefixmem_jax.config_files import load_config
from prefixmem_jax.data.generator import GeneratorConfig
from prefixmem_jax.sid_encoders.prefix_memory import PrefixMemoryConfig

# Decoders other than the baseline's.
Decoder = Literal["small", "large", "tiger"]
# How wide they are where a scale names none.
WIDTHS: Mapping[Decoder, float] = {"small": 0.5, "large": 2, "tiger": 1}


@dataclass(frozen=True)
class Scale:
    """One of them.

    Attributes:
      config: of the baseline, in `configs/`.
      data: what is generated for it.
      memory: of the row PrefixMem; its levels are the last two of the data.
      rates: learning rates that every system is tried at, chosen between on validation.
      decoders: configs in `configs/` whose decoders, and number of text tokens, the others have.
    """

    config: str
    data: GeneratorConfig
    memory: PrefixMemoryConfig
    rates: tuple[float, ...]
    decoders: Mapping[Decoder, str] = field(default_factory=dict)

    def baseline(self, overrides: Sequence[str] = ()) -> Config:
        return load_config(self.config, overrides)

    def memory_of(self, levels: int) -> PrefixMemoryConfig:
        """The memory for SIDs of so many levels."""
        return replace(self.memory, target_levels=(levels - 1, levels), orders=levels - 1)

    def with_decoder(self, base: Config, which: Decoder | None) -> Config:
        """The baseline with another decoder: the one that is named, or its own at another width."""
        if which is None:
            return base
        if which in self.decoders:
            other = load_config(self.decoders[which])
            tokens = {
                key: getattr(other.data, key) for key in ("text_tokens", "vocabulary_multiple")
            }
            return replace(base, model=other.model, data=replace(base.data, **tokens))
        factor, shape = WIDTHS[which], base.model
        wider = replace(
            shape,
            d_model=int(shape.d_model * factor),
            d_ff=int(shape.d_ff * factor),
            query_heads=max(1, int(shape.query_heads * factor)),
            kv_heads=max(1, int(shape.kv_heads * factor)),
        )
        return replace(base, model=wider)


SCALES = {
    "tiny": Scale(
        "paper/tiny",
        GeneratorConfig(codebook_sizes=(256,) * 5, children=(64, 8, 8, 8, 16), personal=0.0),
        PrefixMemoryConfig(rows=2**16, d_mem=64),
        (3e-3, 1e-2, 3e-2),
    ),
    "gpu": Scale(
        "paper/gpu",
        GeneratorConfig(users=4_000_000, children=(256, 16, 16, 16, 16), personal=0.0),
        PrefixMemoryConfig(rows=2_000_000, d_mem=256),
        (3e-4, 1e-3, 3e-3),
    ),
    # 240 million interactions of 10 million users with 33.5 million items.
    "paper": Scale(
        "paper/paper",
        GeneratorConfig(
            users=10_000_000,
            children=(256, 16, 16, 16, 32),
            personal=0.0,
            mean_length=24.0,
            max_length=64,
        ),
        PrefixMemoryConfig(rows=2_000_000, d_mem=256),
        (3e-5, 1e-4, 3e-4),
        {"small": "models/qwen3_0p6b", "large": "models/qwen3_4b", "tiger": "paper/tiger"},
    ),
}
