"""Which decoder a Hugging Face `config.json` describes: Qwen3, Llama 3 and Gemma 3 (text)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import transformers

from prefixmem_jax.config import DecoderConfig, RopeScalingConfig
from prefixmem_jax.errors import UserError

# What a config may say that would change the model and that the decoder cannot do.
_UNSUPPORTED = {
    "attention_bias": False,
    "mlp_bias": False,
    "attn_logit_softcapping": None,
    "use_bidirectional_attention": False,
}
_ACTIVATIONS = {"silu": "silu", "gelu_pytorch_tanh": "gelu_tanh"}


def read_config(folder: str | Path) -> tuple[DecoderConfig, int]:
    """The decoder and the vocabulary size that a Hugging Face folder describes.

    Raises:
      UserError: not a model folder, another family, or a feature that is not supported; names it.
    """
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise UserError(f"{folder}: no config.json; expected a Hugging Face model folder")
    try:
        config = transformers.AutoConfig.from_pretrained(folder)
    except (ValueError, KeyError, OSError) as error:
        raise UserError(f"{path}: {str(error).splitlines()[0]}") from None
    return decoder_config(config, str(path)), config.vocab_size


def decoder_config(config: transformers.PretrainedConfig, where: str) -> DecoderConfig:
    """The decoder of a `transformers` config.

    Args:
      where: named in errors.
    """
    family = _FAMILIES.get(config.model_type)
    if family is None:
        raise UserError(
            f"{where}: model_type {config.model_type!r}; expected one of {', '.join(_FAMILIES)}"
        )
    for name, supported in _UNSUPPORTED.items():
        if getattr(config, name, supported) not in (supported, None):
            raise UserError(f"{where}: {name}={getattr(config, name)} is not supported")
    activation = getattr(config, "hidden_activation", None) or config.hidden_act
    if activation not in _ACTIVATIONS:
        raise UserError(
            f"{where}: activation {activation!r} is not supported; expected one of "
            f"{', '.join(_ACTIVATIONS)}"
        )
    common = {
        "layers": config.num_hidden_layers,
        "d_model": config.hidden_size,
        "d_ff": config.intermediate_size,
        "query_heads": config.num_attention_heads,
        "kv_heads": config.num_key_value_heads,
        "head_dim": getattr(config, "head_dim", None)
        or config.hidden_size // config.num_attention_heads,
        "activation": _ACTIVATIONS[activation],
        "tied_embeddings": bool(config.tie_word_embeddings),
        "norm_epsilon": float(config.rms_norm_eps),
        "init_std": float(config.initializer_range),
    }
    return DecoderConfig(**{**common, **family(config, where)})


def _qwen3(config: Any, where: str) -> dict[str, Any]:
    base, scaling = _rope(config.rope_parameters, where)
    sliding = _sliding_layers(config)
    if sliding and scaling is not None:
        raise UserError(f"{where}: sliding layers with rope scaling are not supported")
    return {
        "qk_norm": True,
        "rope_base": base,
        "rope_scaling": scaling,
        "sliding_layers": sliding,
        "sliding_window": config.sliding_window if sliding else 0,
        "sliding_rope_base": base if sliding else 10_000.0,
    }


def _llama(config: Any, where: str) -> dict[str, Any]:
    base, scaling = _rope(config.rope_parameters, where)
    return {"qk_norm": False, "rope_base": base, "rope_scaling": scaling}


def _gemma3(config: Any, where: str) -> dict[str, Any]:
    base, scaling = _rope(config.rope_parameters["full_attention"], where)
    sliding_base, sliding_scaling = _rope(config.rope_parameters["sliding_attention"], where)
    if sliding_scaling is not None:
        raise UserError(f"{where}: rope scaling of sliding_attention is not supported")
    sliding = _sliding_layers(config)
    return {
        "qk_norm": True,
        "norm_plus_one": True,
        "post_norms": True,
        "query_scale": float(config.query_pre_attn_scalar) ** -0.5,
        "scale_embedding": True,
        "logit_softcap": config.final_logit_softcapping,
        "rope_base": base,
        "rope_scaling": scaling,
        "sliding_layers": sliding,
        "sliding_window": config.sliding_window if sliding else 0,
        "sliding_rope_base": sliding_base,
    }


_FAMILIES: dict[str, Callable[[Any, str], dict[str, Any]]] = {
    "qwen3": _qwen3,
    "llama": _llama,
    "gemma3_text": _gemma3,
}


def _sliding_layers(config: Any) -> tuple[int, ...]:
    return tuple(n for n, kind in enumerate(config.layer_types) if kind == "sliding_attention")


def _rope(parameters: dict[str, Any], where: str) -> tuple[float, RopeScalingConfig | None]:
    """Base and scaling of one `rope_parameters` entry."""
    kind, base = parameters.get("rope_type", "default"), float(parameters["rope_theta"])
    if parameters.get("partial_rotary_factor", 1.0) != 1.0:
        raise UserError(f"{where}: rope_parameters: partial_rotary_factor is not supported")
    if kind == "default":
        return base, None
    if kind == "linear":
        return base, RopeScalingConfig("linear", float(parameters["factor"]))
    if kind == "llama3":
        return base, RopeScalingConfig(
            "llama3",
            float(parameters["factor"]),
            float(parameters["low_freq_factor"]),
            float(parameters["high_freq_factor"]),
            int(parameters["original_max_position_embeddings"]),
        )
    raise UserError(f"{where}: rope_type {kind!r} is not supported")
