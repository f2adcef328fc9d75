"""Oracles: random models of transformers' own classes in torch, small, one of every kind."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    PretrainedConfig,
    PreTrainedModel,
    Qwen3Config,
)

torch.set_num_threads(1)  # so small that more would only wait for each other
VOCABULARY = 64
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 48,
    "intermediate_size": 72,
    "initializer_range": 0.2,
    "max_position_embeddings": 256,
}
LLAMA3_ROPE = {
    "rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0,
    "high_freq_factor": 4.0, "original_max_position_embeddings": 32,
}  # fmt: skip
GEMMA_ROPE = {
    "sliding_attention": {"rope_type": "default", "rope_theta": 1e3},
    "full_attention": {"rope_type": "linear", "rope_theta": 1e5, "factor": 4.0},
}
PATTERN = ["sliding_attention", "sliding_attention", "full_attention"]


def qwen3(heads=6, kv=3, head_dim=16, tied=False, **more) -> Qwen3Config:
    return Qwen3Config(
        **SIZES, num_hidden_layers=3, num_attention_heads=heads, num_key_value_heads=kv,
        head_dim=head_dim, tie_word_embeddings=tied, **more,
    )  # fmt: skip


def llama(heads=6, kv=3, head_dim=8, tied=False, **more) -> LlamaConfig:
    return LlamaConfig(
        **SIZES, num_hidden_layers=3, num_attention_heads=heads, num_key_value_heads=kv,
        head_dim=head_dim, tie_word_embeddings=tied, **more,
    )  # fmt: skip


def gemma3(heads=4, kv=1, head_dim=16, window=5, layers=4, **more) -> Gemma3TextConfig:
    pattern = [PATTERN[n % 3] for n in range(layers)]
    return Gemma3TextConfig(
        **SIZES, num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=kv,
        head_dim=head_dim, sliding_window=window, layer_types=pattern, query_pre_attn_scalar=20,
        rope_parameters=GEMMA_ROPE, **more,
    )  # fmt: skip


ORACLES: dict[str, PretrainedConfig] = {
    "qwen3": qwen3(),
    "qwen3, even": qwen3(heads=4, kv=2),
    "qwen3, 5 query heads, tied": qwen3(heads=5, kv=1, tied=True),
    "qwen3, sliding": qwen3(
        use_sliding_window=True, sliding_window=4, layer_types=PATTERN
    ),
    "llama": llama(),
    "llama, llama3 rope, tied": llama(tied=True, rope_parameters=LLAMA3_ROPE),
    "llama, one kv head, no head_dim": llama(
        heads=3, kv=1, head_dim=None,
        rope_parameters={"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0},
    ),
    "gemma3": gemma3(),
    "gemma3, odd heads, soft cap": gemma3(heads=3, kv=3, window=3, final_logit_softcapping=3.0),
}  # fmt: skip


def save_oracle(folder: Path, name: str, shard: str = "1GB") -> PreTrainedModel:
    """A random model, saved as its users would find it."""
    torch.manual_seed(0)
    oracle = AutoModelForCausalLM.from_config(ORACLES[name]).eval()
    with torch.no_grad():
        for parameter_name, parameter in oracle.named_parameters():
            if "norm" in parameter_name:  # or a norm that is skipped would go unseen
                parameter.uniform_(-0.5, 0.5) if "gemma" in name else parameter.uniform_(0.5, 1.5)
    oracle.save_pretrained(folder, max_shard_size=shard)
    return oracle


def torch_logits(model: PreTrainedModel, tokens: np.ndarray) -> np.ndarray:
    """Float32 logits of whole sequences [B, S]."""
    with torch.no_grad():
        return model(torch.tensor(tokens).long()).logits.float().numpy()


def close(found: np.ndarray, expected: np.ndarray, tolerance: float) -> None:
    """Asserts that the largest difference is within `tolerance` of the largest number."""
    assert np.abs(found - expected).max() <= tolerance * np.abs(expected).max()
