"""Next-token prediction over packed documents: the decoder, with its SID encoder if it has one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from prefixmem_jax.config_groups import DataConfig, DecoderConfig
from prefixmem_jax.data.batch import Batch
from prefixmem_jax.data.documents import (
    document_length,
    example_documents,
    training_documents,
)
from prefixmem_jax.data.packing import one_per_row, pack
from prefixmem_jax.data.prepare import PreparedData, fixed_sample
from prefixmem_jax.models.sid_lm import SidLM
from prefixmem_jax.objectives.objective import Objective
from prefixmem_jax.parallel.sharding import constrain
from prefixmem_jax.semantic_ids.vocabulary import Vocabulary
from prefixmem_jax.sid_encoders.sid_encoder import SidEncoderConfig


@dataclass(frozen=True)
class NextToken(Objective):
    """Cross-entropy of every next token of users' histories."""

    generates: ClassVar[bool] = True

    def build_model(
        self,
        model: DecoderConfig,
        sid_encoder: SidEncoderConfig | None,
        vocabulary: Vocabulary,
        rngs: nnx.Rngs,
    ) -> SidLM:
        return SidLM(model, sid_encoder, vocabulary, rngs=rngs)

    def abstract_batch(
        self, data: DataConfig, sharding: jax.sharding.Sharding | None = None
    ) -> Batch:
        return Batch.abstract(data.batch_size, data.sequence_length, sharding)

    def training_rows(self, data: PreparedData, config: DataConfig, seed: int) -> Batch:
        documents = training_documents(
            data.split.items,
            data.split.train,
            data.item_tokens,
            data.vocabulary,
            config.max_items,
            config.sequence_length,
        )
        return pack(documents, config.sequence_length, seed)

    def validation_rows(
        self, data: PreparedData, config: DataConfig, examples: int, length_multiple: int
    ) -> Batch:
        validation = data.split.validation
        sample = validation.take(fixed_sample(len(validation), examples))
        documents = example_documents(sample, data.item_tokens, data.vocabulary, config.max_items)
        length = document_length(data.vocabulary.levels, config.max_items + 1)
        return one_per_row(documents, length + -length % length_multiple)

    def predicted(self, model: nnx.Module, batch: Batch) -> jax.Array:
        """Weight float32 [B, S] of the prediction made at each position."""
        del model
        return batch.loss_mask

    def loss_sums(
        self, model: nnx.Module, batch: Batch, rows: jax.Array | None, key: jax.Array | None
    ) -> dict[str, jax.Array]:
        """Cross-entropy and hits, as sums over the batch.

        Returns:
          loss: float32 [], summed over predicted positions; count: their number.
          hits, level_count: float32 [levels], by level of the predicted token (top-1 over the whole
          vocabulary).
        """
        del key
        logits_BSV = model.next_token_logits(batch, rows)
        mask_BS = self.predicted(model, batch)
        with jax.named_scope("loss"):
            return _cross_entropy_sums(logits_BSV, batch.tokens, mask_BS, model.vocabulary)

    def summarize(self, sums: dict[str, Any], prefix: str = "") -> dict[str, float]:
        """Mean loss and accuracy per level; levels with nothing to predict are left out."""
        summary = {f"{prefix}loss": float(sums["loss"]) / max(float(sums["count"]), 1.0)}
        hits, counts = np.asarray(sums["hits"]), np.asarray(sums["level_count"])
        for level, (hit, count) in enumerate(zip(hits, counts, strict=True), start=1):
            if count > 0:
                summary[f"{prefix}accuracy/level_{level}"] = float(hit) / float(count)
        return summary


def _cross_entropy_sums(
    logits_BSV: jax.Array, tokens_BS: jax.Array, mask_BS: jax.Array, vocabulary: Vocabulary
) -> dict[str, jax.Array]:
    target_BS = jnp.pad(tokens_BS[:, 1:], ((0, 0), (0, 1)))
    # Reductions over the vocabulary only, which may be sharded: no gather of the target's logit.
    token_V = jnp.arange(logits_BSV.shape[-1], dtype=target_BS.dtype)
    is_target_BSV = constrain(token_V, "vocabulary") == target_BS[..., None]
    target_logit_BS = jnp.sum(jnp.where(is_target_BSV, logits_BSV, 0.0), axis=-1)
    loss_BS = jax.nn.logsumexp(logits_BSV, axis=-1) - target_logit_BS
    # Top-1 alone: a tie is a miss, or a model that says nothing would score full marks.
    at_least_BS = jnp.sum(logits_BSV >= target_logit_BS[..., None], axis=-1)
    hit_BS = (at_least_BS == 1) * mask_BS
    target_level_BS, _ = vocabulary.level_and_code(target_BS)
    by_level = [(target_level_BS == level) for level in range(1, vocabulary.levels + 1)]
    return {
        "loss": jnp.sum(loss_BS * mask_BS),
        "count": jnp.sum(mask_BS),
        "hits": jnp.stack([jnp.sum(hit_BS * at) for at in by_level]),
        "level_count": jnp.stack([jnp.sum(mask_BS * at) for at in by_level]),
    }
