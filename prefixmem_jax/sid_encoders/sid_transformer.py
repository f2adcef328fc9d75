"""SID-Transformer, the paper's comparator: a small causal transformer reads the prefix itself."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx
from pydantic import PositiveInt

from prefixmem_jax.config_groups import DecoderConfig
from prefixmem_jax.errors import UserError
from prefixmem_jax.layers.attention import KeyValues
from prefixmem_jax.layers.transformer import (
    WHOLE,
    Layer,
    RMSNorm,
    rope_frequencies,
    rotation,
)
from prefixmem_jax.parallel.parameters import normal
from prefixmem_jax.parallel.sharding import constrain, gather_over_fsdp, take
from prefixmem_jax.semantic_ids.space import SidSpace
from prefixmem_jax.semantic_ids.vocabulary import Vocabulary, earlier
from prefixmem_jax.sid_encoders.sid_encoder import SidEncoder, SidEncoderConfig


@dataclass(frozen=True)
class SidTransformerConfig(SidEncoderConfig):
    """SID-Transformer's sizes; four layers are the paper's.

    Attributes:
      target_levels: 1-based levels to help predict, as PrefixMem's.
      layers, width, d_ff, heads: of the transformer; its vectors are projected to the decoder's.
    """

    target_levels: tuple[PositiveInt, ...] = (4, 5)
    layers: PositiveInt = 4
    width: PositiveInt = 256
    d_ff: PositiveInt = 1024
    heads: PositiveInt = 4

    def check_keys(self) -> None:
        if not self.target_levels:
            raise UserError("sid_encoder.target_levels=(): expected one level or more")
        if self.dropout:
            raise UserError(
                f"sid_encoder.dropout={self.dropout} drops rows of a table, and sid_transformer "
                "has none; expected 0"
            )
        if self.width % (2 * self.heads):
            raise UserError(
                f"sid_encoder.width={self.width} does not divide by twice "
                f"sid_encoder.heads={self.heads}"
            )

    def check(self, space: SidSpace) -> None:
        for level in self.target_levels:
            if not 2 <= level <= space.levels:
                raise UserError(
                    f"sid_encoder.target_levels={self.target_levels}: level {level} is outside "
                    f"2..{space.levels} (the SIDs have {space.levels} levels)"
                )

    def divided(self, fsdp: int, tensor: int) -> list[tuple[str, int, int]]:
        return [
            ("sid_encoder.heads", self.heads, tensor),
            ("sid_encoder.d_ff", self.d_ff, tensor),
            ("sid_encoder.width", self.width, fsdp * tensor),
        ]

    def build(
        self, vocabulary: Vocabulary, d_model: int, output_std: float | None, rngs: nnx.Rngs
    ) -> SidTransformer:
        return SidTransformer(self, vocabulary, d_model, output_std, rngs=rngs)


class SidTransformer(SidEncoder):
    """The last hidden state over the tokens c_1..c_l of the item that is being written.

    Attention stays within the item, so that a vector depends on its prefix alone, wherever it is;
    and costs as many scores a token as there are levels.
    """

    def __init__(
        self,
        config: SidTransformerConfig,
        vocabulary: Vocabulary,
        d_model: int,
        output_std: float | None,
        *,
        rngs: nnx.Rngs,
    ):
        self.config, self.vocabulary = config, vocabulary
        self.shape = DecoderConfig(
            layers=config.layers,
            d_model=config.width,
            d_ff=config.d_ff,
            query_heads=config.heads,
            kv_heads=config.heads,
            head_dim=config.width // config.heads,
        )
        std = config.width**-0.5
        width = (config.width, "stored_embedded")
        self.embedding = normal(rngs, std, (vocabulary.size, None), width)
        self.layers = nnx.List([Layer(self.shape, rngs=rngs) for _ in range(config.layers)])
        self.norm = RMSNorm(config.width, self.shape)
        scale = std if output_std is None else output_std
        self.projection = normal(rngs, scale, (config.width, None), (d_model, None))

    def active(self, tokens_BS: jax.Array, segment_ids_BS: jax.Array) -> jax.Array:
        level_BS, _ = self.vocabulary.prefixes(tokens_BS, segment_ids_BS)
        before = jnp.asarray([level - 1 for level in self.config.target_levels])
        return jnp.any(level_BS[..., None] == before, axis=-1)

    def __call__(
        self,
        tokens_BS: jax.Array,
        segment_ids_BS: jax.Array,
        rows_BPAW: jax.Array | None,
        last: int | None = None,
    ) -> jax.Array:
        del rows_BPAW
        level_BS, _ = self.vocabulary.prefixes(tokens_BS, segment_ids_BS)
        frequency_H = jnp.asarray(rope_frequencies(self.shape.head_dim, self.shape.rope_base))
        rotation_BSH = rotation(jnp.maximum(level_BS - 1, 0), frequency_H)

        def attend(query: jax.Array, new: KeyValues) -> tuple[jax.Array, KeyValues]:
            return _attention_to_prefix(query, new, level_BS, self.vocabulary.levels), new

        dtype = self.shape.compute_dtype
        table = gather_over_fsdp(self.embedding[...], dtype, None, "embedded")
        x_BSD = constrain(take(table, tokens_BS, "batch", None, "embedded"), *WHOLE)
        for layer in self.layers:
            x_BSD, _ = layer(x_BSD, rotation_BSH, attend)
        vectors_BSD = jnp.einsum("BSW,WD->BSD", self.norm(x_BSD), self.projection[...])
        active_BS = self.active(tokens_BS, segment_ids_BS)
        vectors_BSD = jnp.where(active_BS[..., None], vectors_BSD, 0.0)
        return vectors_BSD if last is None else vectors_BSD[:, -last:]


def _attention_to_prefix(
    query_BSNH: jax.Array, own: KeyValues, level_BS: jax.Array, levels: int
) -> jax.Array:
    """Attention to the last l tokens, this one included: [B, S, N, H]; with l = 0 to anything."""
    keys_BSANH, values_BSANH = (
        jnp.stack([earlier(x, back) for back in range(levels)], axis=2) for x in own
    )
    scale = query_BSNH.shape[-1] ** -0.5
    wide = {"preferred_element_type": jnp.float32}
    scores_BSNA = jnp.einsum("BSNH,BSANH->BSNA", query_BSNH, keys_BSANH, **wide) * scale
    near_BSA = jnp.arange(levels) < level_BS[..., None]
    scores_BSNA = jnp.where(near_BSA[:, :, None], scores_BSNA, jnp.finfo(jnp.float32).min)
    weights_BSNA = jax.nn.softmax(scores_BSNA, axis=-1).astype(query_BSNH.dtype)
    return jnp.einsum("BSNA,BSANH->BSNH", weights_BSNA, values_BSANH)
