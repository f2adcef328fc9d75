"""One table of weights: their Hugging Face names, our paths, and how the two shapes correspond.

A model with a SID encoder or an item head is, in Hugging Face's format, the stock model under
`llm.` beside modules `prefix_memory` and `item_head` (`exported/modeling_prefixmem.py`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from prefixmem_jax.config_groups import DecoderConfig, ItemHeadConfig
from prefixmem_jax.sid_encoders.prefix_memory import PrefixMemoryConfig


@dataclass(frozen=True)
class Weight:
    """One weight, or one of every layer.

    Attributes:
      name: in Hugging Face's files, `{layer}` for the layer's number.
      path: in the parameters by part; layers are stacked along a leading axis there.
      inputs: leading axes of ours that a linear map reads from. Hugging Face keeps such a map as
        [outputs, inputs], both flat; None means that the arrays are the same.
    """

    name: str
    path: tuple[str, ...]
    inputs: int | None = None

    @property
    def per_layer(self) -> bool:
        return "{layer}" in self.name

    def to_ours(self, array: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        """Hugging Face's array in our shape (of one layer)."""
        return array.reshape(shape) if self.inputs is None else array.T.reshape(shape)

    def hf_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Hugging Face's shape of our array (of one layer)."""
        if self.inputs is None:
            return shape
        return math.prod(shape[self.inputs :]), math.prod(shape[: self.inputs])

    def to_hf(self, array: np.ndarray) -> np.ndarray:
        """Our array (of one layer) as Hugging Face keeps it; the inverse of `to_ours`."""
        if self.inputs is None:
            return array
        return array.reshape(math.prod(array.shape[: self.inputs]), -1).T


@dataclass(frozen=True)
class Architecture:
    """What a model is made of."""

    decoder: DecoderConfig
    sid_encoder: PrefixMemoryConfig | None = None
    item_head: ItemHeadConfig | None = None

    @property
    def is_stock(self) -> bool:
        """Whether transformers' own class computes it."""
        return self.sid_encoder is None and self.item_head is None


def weights(model: Architecture) -> list[Weight]:
    """Every weight of a model, but for the memory's rows (`table_names`)."""
    decoder = model.decoder
    above = "" if model.is_stock else "llm."

    def of_model(name: str, *path: str, inputs: int | None = None) -> Weight:
        return Weight(f"{above}{name}.weight", ("llm", *path), inputs)

    def of_layer(name: str, *path: str, inputs: int | None = None) -> Weight:
        return of_model(f"model.layers.{{layer}}.{name}", "layers", *path, inputs=inputs)

    table = [of_model("model.embed_tokens", "embedding")]
    if not decoder.tied_embeddings:
        table.append(of_model("lm_head", "head", inputs=1))
    table += [
        of_model("model.norm", "final_norm", "scale"),
        of_layer("self_attn.q_proj", "query", inputs=1),
        of_layer("self_attn.k_proj", "key", inputs=1),
        of_layer("self_attn.v_proj", "value", inputs=1),
        of_layer("self_attn.o_proj", "output", inputs=2),
        of_layer("mlp.gate_proj", "gate", inputs=1),
        of_layer("mlp.up_proj", "up", inputs=1),
        of_layer("mlp.down_proj", "down", inputs=1),
        of_layer("input_layernorm", "attention_norm", "scale"),
    ]
    if decoder.qk_norm:
        table.append(of_layer("self_attn.q_norm", "query_norm", "scale"))
        table.append(of_layer("self_attn.k_norm", "key_norm", "scale"))
    if decoder.post_norms:
        table.append(of_layer("post_attention_layernorm", "attention_post_norm", "scale"))
        table.append(of_layer("pre_feedforward_layernorm", "mlp_norm", "scale"))
        table.append(of_layer("post_feedforward_layernorm", "mlp_post_norm", "scale"))
    else:
        table.append(of_layer("post_attention_layernorm", "mlp_norm", "scale"))
    if model.sid_encoder is not None:
        table.append(Weight("prefix_memory.projection.weight", ("sid_encoder", "projection"), 2))
    if model.item_head is not None and model.item_head.vectors == "own":
        table.append(Weight("item_head.weight", ("item_head", "vectors"), 1))
    return table


def table_names(sid_encoder: PrefixMemoryConfig) -> list[str]:
    """Names of the tables E[n, h], [rows, d_mem / heads] each, in the order of `hashing.addresses`.

    Table t's row i is row `i * tables + t` of our one array.
    """
    return [f"prefix_memory.tables.{table}.weight" for table in range(sid_encoder.tables)]
