"""Qwen3, Llama 3 and Gemma 3 (text): from their Hugging Face configs to a decoder, and back."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import transformers

from prefixmem_jax.config_groups import DecoderConfig, RopeScalingConfig
from prefixmem_jax.errors import UserError
from prefixmem_jax.files import read_json_object
from prefixmem_jax.hf.exported_config import (
    object_at,
    read_item_head,
    read_sid_encoder,
    read_vocabulary,
    validated,
)
from prefixmem_jax.hf.mapping import Architecture
from prefixmem_jax.hf.tokenizer import text_tokenizer

# What a config may say that would change the model and that the decoder cannot do.
_UNSUPPORTED = {
    "attention_bias": False,
    "mlp_bias": False,
    "attn_logit_softcapping": None,
    "use_bidirectional_attention": False,
}
_ACTIVATIONS = {"silu": "silu", "gelu_pytorch_tanh": "gelu_tanh"}
_DTYPES = ("auto", "float64", "float32", "float16", "bfloat16")
# What Hugging Face's configs call our keys: in every family, and where a family has them.
_KEYS = {
    "layers": "num_hidden_layers",
    "d_model": "hidden_size",
    "d_ff": "intermediate_size",
    "query_heads": "num_attention_heads",
    "kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "norm_epsilon": "rms_norm_eps",
    "init_std": "initializer_range",
}
_FAMILY_KEYS = {
    "query_scale": "query_pre_attn_scalar",
    "logit_softcap": "final_logit_softcapping",
    "rope_base": "rope_theta",
    "sliding_rope_base": "rope_theta",
    "low_frequency_factor": "low_freq_factor",
    "high_frequency_factor": "high_freq_factor",
    "original_length": "original_max_position_embeddings",
}


@dataclass(frozen=True)
class ModelFolder:
    """What a Hugging Face model folder holds, but for the weights.

    Attributes:
      vocabulary: tokens that the weights have.
      text_tokens: tokens before padding, BOS and SID tokens; where the folder has no SID tokens,
        all of its weights or of its tokenizer, whichever has more.
      codebook_sizes: of its SID tokens, or none.
      model: what it is made of.
      multipliers: of its memory's hash, if it has a memory.
      item_outputs: of its item head, if it has one; items: those that are real.
    """

    config: transformers.PretrainedConfig
    model: Architecture
    vocabulary: int
    text_tokens: int
    codebook_sizes: tuple[int, ...] | None = None
    multipliers: np.ndarray | None = None
    items: int = 0
    item_outputs: int = 0

    @property
    def decoder(self) -> DecoderConfig:
        return self.model.decoder


def read_folder(folder: str | Path) -> ModelFolder:
    """Reads the config (and counts the tokenizer's tokens) of a Hugging Face folder.

    The folder is a model of one of the families, or what `prefixmem export` wrote.

    Raises:
      UserError: not a model folder, another family, or a feature that is not supported; names it.
    """
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise UserError(f"{folder}: no config.json; expected a Hugging Face model folder")
    where, content = str(path), read_json_object(path)
    memory, head = content.get("prefix_memory"), content.get("item_head")
    if content.get("model_type") == "prefixmem" or memory is not None or head is not None:
        if memory is not None or head is None:
            memory = object_at(content, "prefix_memory", where)
        stock = object_at(content, "text_config", where)
        config = _stock_config(stock, where, lambda: transformers.AutoConfig.for_model(**stock))
    else:
        config = _stock_config(
            content, where, lambda: transformers.AutoConfig.from_pretrained(folder)
        )
    decoder, size = decoder_config(config, where), config.vocab_size
    if memory is None and head is None and content.get("semantic_ids") is None:
        tokenizer = text_tokenizer(folder)
        tokens = 0 if tokenizer is None else len(tokenizer)
        return ModelFolder(config, Architecture(decoder), size, max(size, tokens))
    sids = object_at(content, "semantic_ids", where)
    vocabulary = read_vocabulary(sids, size, where)
    sid_encoder = multipliers = item_head = None
    items = outputs = 0
    if memory is not None:
        sid_encoder, multipliers = read_sid_encoder(memory, vocabulary.space, where)
    if head is not None:
        item_head, items, outputs = read_item_head(
            object_at(content, "item_head", where), sids, where
        )
        if item_head.vectors == "memory" and (sid_encoder is None or not sid_encoder.reads_items):
            raise UserError(
                f"{where}: item_head.vectors=memory, and prefix_memory.target_levels has no level 1"
            )
    return ModelFolder(
        config,
        Architecture(decoder, sid_encoder, item_head),
        size,
        vocabulary.text_tokens,
        vocabulary.space.codebook_sizes,
        multipliers,
        items,
        outputs,
    )


def _stock_config(
    content: dict[str, Any], where: str, read: Callable[[], transformers.PretrainedConfig]
) -> transformers.PretrainedConfig:
    """What transformers reads of a stock model's keys, which may say anything."""
    kind, dtype = content.get("model_type"), content.get("dtype", content.get("torch_dtype"))
    if not isinstance(kind, str) or kind not in _FAMILIES:
        raise UserError(f"{where}: model_type {kind!r}; expected one of {', '.join(_FAMILIES)}")
    if dtype not in (None, *_DTYPES):
        raise UserError(f"{where}: dtype {dtype!r}; expected one of {', '.join(_DTYPES)}")
    try:
        config = read()
    except Exception as error:  # of many kinds, in several lines, from its own checks
        raise UserError(f"{where}: {' '.join(str(error).split())}") from None
    if type(config.vocab_size) is not int or config.vocab_size < 1:
        raise UserError(f"{where}: vocab_size: expected 1 or more, got {config.vocab_size!r}")
    return config


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
    keys = {ours: getattr(config, theirs, None) for ours, theirs in _KEYS.items()}
    if not keys["head_dim"]:
        keys["head_dim"] = config.hidden_size // max(config.num_attention_heads, 1)
    keys["activation"] = _ACTIVATIONS[activation]
    keys["tied_embeddings"] = bool(config.tie_word_embeddings)
    decoder = validated(DecoderConfig, keys | family(config, where), where, _KEYS | _FAMILY_KEYS)
    try:
        decoder.check()
    except UserError as error:
        text = re.sub(r"model\.(\w+)", lambda key: _KEYS.get(key[1], key[1]), str(error))
        raise UserError(f"{where}: {text}") from None
    return decoder


def huggingface_config(
    decoder: DecoderConfig, vocabulary: int, max_positions: int
) -> transformers.PretrainedConfig:
    """The inverse of `decoder_config`.

    Raises:
      UserError: none of the families' architectures computes this decoder.
    """
    if decoder.norm_plus_one:
        kind, own = "gemma3_text", _to_gemma3(decoder)
    elif decoder.qk_norm:
        kind, own = "qwen3", _to_qwen3(decoder)
    else:
        kind, own = "llama", {"rope_parameters": _to_rope(decoder.rope_base, decoder.rope_scaling)}
    activation = next(k for k, v in _ACTIVATIONS.items() if v == decoder.activation)
    config = transformers.AutoConfig.for_model(
        kind,
        vocab_size=vocabulary,
        max_position_embeddings=max_positions,
        num_hidden_layers=decoder.layers,
        hidden_size=decoder.d_model,
        intermediate_size=decoder.d_ff,
        num_attention_heads=decoder.query_heads,
        num_key_value_heads=decoder.kv_heads,
        head_dim=decoder.head_dim,
        tie_word_embeddings=decoder.tied_embeddings,
        rms_norm_eps=decoder.norm_epsilon,
        initializer_range=decoder.init_std,
        **{"hidden_activation" if kind == "gemma3_text" else "hidden_act": activation},
        # Tokens of a text vocabulary that is not ours.
        **dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id")),
        **own,
    )
    difference = differing_key(decoder_config(config, kind), decoder)
    if difference:
        raise UserError(
            f"model.{difference}={getattr(decoder, difference)}: no Hugging Face architecture of "
            f"{', '.join(_FAMILIES)} computes this decoder"
        )
    return config


def differing_key(first: DecoderConfig, second: DecoderConfig) -> str | None:
    """The first key by which two decoders compute something else, or none."""
    first, second = _in_one_form(first), _in_one_form(second)
    for item in dataclasses.fields(DecoderConfig):
        if getattr(first, item.name) != getattr(second, item.name):
            return item.name
    return None


def _in_one_form(decoder: DecoderConfig) -> DecoderConfig:
    """The same decoder, where several values say the same or say only how it is computed."""
    plain = DecoderConfig()
    scale = decoder.query_scale
    changes: dict[str, Any] = {
        "query_scale": decoder.head_dim**-0.5 if scale is None else scale,
        "compute_dtype": plain.compute_dtype,
        "remat": plain.remat,
        "scan_layers": plain.scan_layers,
        "dropout": plain.dropout,
        "init_std": plain.init_std,
    }
    if not decoder.sliding_layers:
        for name in ("sliding_window", "sliding_rope_base"):
            changes[name] = getattr(plain, name)
    return dataclasses.replace(decoder, **changes)


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
    sliding, scalar = _sliding_layers(config), config.query_pre_attn_scalar
    return {
        "qk_norm": True,
        "norm_plus_one": True,
        "post_norms": True,
        "query_scale": float(scalar) ** -0.5 if scalar > 0 else scalar,
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


def _rope(parameters: dict[str, Any], where: str) -> tuple[Any, dict[str, Any] | None]:
    """Base and `rope_scaling` of one `rope_parameters` entry, as they stand there."""
    kind, base = parameters.get("rope_type", "default"), parameters.get("rope_theta")
    if parameters.get("partial_rotary_factor", 1.0) != 1.0:
        raise UserError(f"{where}: rope_parameters: partial_rotary_factor is not supported")
    if kind == "default":
        return base, None
    names = {
        "linear": ("factor",),
        "llama3": ("factor", "low_frequency_factor", "high_frequency_factor", "original_length"),
    }
    if kind not in tuple(names):
        raise UserError(f"{where}: rope_type {kind!r} is not supported")
    keys = {name: parameters.get(_FAMILY_KEYS.get(name, name)) for name in names[kind]}
    return base, {"kind": kind, **keys}


def _to_rope(base: float, scaling: RopeScalingConfig | None) -> dict[str, Any]:
    """The inverse of `_rope`."""
    if scaling is None:
        return {"rope_type": "default", "rope_theta": base}
    parameters: dict[str, Any] = {
        "rope_type": scaling.kind,
        "rope_theta": base,
        "factor": scaling.factor,
    }
    if scaling.kind == "llama3":
        parameters["low_freq_factor"] = scaling.low_frequency_factor
        parameters["high_freq_factor"] = scaling.high_frequency_factor
        parameters["original_max_position_embeddings"] = scaling.original_length
    return parameters


def _layer_types(decoder: DecoderConfig) -> list[str]:
    sliding = decoder.sliding_layers
    return [f"{'sliding' if n in sliding else 'full'}_attention" for n in range(decoder.layers)]


def _to_qwen3(decoder: DecoderConfig) -> dict[str, Any]:
    slides = bool(decoder.sliding_layers)
    return {
        "rope_parameters": _to_rope(decoder.rope_base, decoder.rope_scaling),
        "layer_types": _layer_types(decoder),
        "use_sliding_window": slides,
        "sliding_window": decoder.sliding_window if slides else None,
    }


def _to_gemma3(decoder: DecoderConfig) -> dict[str, Any]:
    scale = decoder.query_scale
    return {
        "rope_parameters": {
            "full_attention": _to_rope(decoder.rope_base, decoder.rope_scaling),
            "sliding_attention": _to_rope(decoder.sliding_rope_base, None),
        },
        "layer_types": _layer_types(decoder),
        "sliding_window": decoder.sliding_window if decoder.sliding_layers else 4096,
        "query_pre_attn_scalar": decoder.head_dim if scale is None else round(scale**-2),
        "final_logit_softcapping": decoder.logit_softcap,
    }
