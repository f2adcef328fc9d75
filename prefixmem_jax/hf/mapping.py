"""One table of weights: their Hugging Face names, our paths, and how the two shapes correspond."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from prefixmem_jax.config import DecoderConfig


@dataclass(frozen=True)
class Weight:
    """One weight, or one of every layer.

    Attributes:
      name: in Hugging Face's files, `{layer}` for the layer's number.
      path: in the decoder's parameters; layers are stacked along a leading axis there.
      inputs: leading axes of ours that a linear map reads from. Hugging Face keeps such a map as
        [outputs, inputs], both flat; None means that the arrays are the same.
      by_token: Hugging Face's leading axis is the vocabulary.
    """

    name: str
    path: tuple[str, ...]
    inputs: int | None = None
    by_token: bool = False

    @property
    def per_layer(self) -> bool:
        return "{layer}" in self.name

    def to_ours(self, array: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        """Hugging Face's array in our shape (of one layer)."""
        return array if self.inputs is None else array.T.reshape(shape)

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


def weights(config: DecoderConfig) -> list[Weight]:
    """Every weight of a decoder."""

    def of_layer(name: str, *path: str, inputs: int | None = None) -> Weight:
        return Weight(f"model.layers.{{layer}}.{name}.weight", ("layers", *path), inputs)

    found = [
        Weight("model.embed_tokens.weight", ("embedding",), by_token=True),
        Weight("model.norm.weight", ("final_norm", "scale")),
        of_layer("self_attn.q_proj", "query", inputs=1),
        of_layer("self_attn.k_proj", "key", inputs=1),
        of_layer("self_attn.v_proj", "value", inputs=1),
        of_layer("self_attn.o_proj", "output", inputs=2),
        of_layer("mlp.gate_proj", "gate", inputs=1),
        of_layer("mlp.up_proj", "up", inputs=1),
        of_layer("mlp.down_proj", "down", inputs=1),
        of_layer("input_layernorm", "attention_norm", "scale"),
    ]
    if not config.tied_embeddings:
        found.append(Weight("lm_head.weight", ("head",), inputs=1, by_token=True))
    if config.qk_norm:
        found.append(of_layer("self_attn.q_norm", "query_norm", "scale"))
        found.append(of_layer("self_attn.k_norm", "key_norm", "scale"))
    if config.post_norms:
        found.append(of_layer("post_attention_layernorm", "attention_post_norm", "scale"))
        found.append(of_layer("pre_feedforward_layernorm", "mlp_norm", "scale"))
        found.append(of_layer("post_feedforward_layernorm", "mlp_post_norm", "scale"))
    else:
        found.append(of_layer("post_attention_layernorm", "mlp_norm", "scale"))
    return found
