"""Next-token prediction over packed documents: the decoder, with its SID encoder if it has one."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from prefixmem_jax.config_groups import DataConfig, Rate
from prefixmem_jax.data.batch import Batch
from prefixmem_jax.data.documents import (
    document_length,
    example_documents,
    training_documents,
)
from prefixmem_jax.data.packing import one_per_row, pack
from prefixmem_jax.data.prepare import PreparedData, fixed_sample
from prefixmem_jax.models.item_head import item_places
from prefixmem_jax.models.sid_lm import SidLM
from prefixmem_jax.objectives.objective import Objective
from prefixmem_jax.parallel.sharding import constrain, take_positions
from prefixmem_jax.semantic_ids.vocabulary import Vocabulary


@dataclass(frozen=True)
class NextToken(Objective):
    """Cross-entropy of every next token of users' histories, and of every next item if there is
    an item head.

    Attributes:
      label_smoothing: share of a target's probability that is spread evenly over the vocabulary.
    """

    label_smoothing: Rate = field(default=0.0, kw_only=True)
    generates: ClassVar[bool] = True

    def build_model(self, config: Any, vocabulary: Vocabulary, rngs: nnx.Rngs) -> SidLM:
        return SidLM(config.model, config.sid_encoder, vocabulary, config.item_head, rngs=rngs)

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
          vocabulary). With an item head item_loss, which is part of loss, item_count, and in
          validation item_hits (top-10).
        """
        hidden_BSD, _ = model(batch, rows, key)
        logits_BSV = model.logits(hidden_BSD)
        mask_BS = self.predicted(model, batch)
        smoothing = 0.0 if key is None else self.label_smoothing
        with jax.named_scope("loss"):
            sums = _token_sums(logits_BSV, batch.tokens, mask_BS, model.vocabulary, smoothing)
        if model.item_head is not None:
            with jax.named_scope("item_head"):
                next_item_BS = batch.next_item * mask_BS.astype(jnp.int32)
                sums |= _item_sums(model, hidden_BSD, next_item_BS, with_hits=key is None)
                sums["loss"] += model.item_head.weight * sums["item_loss"]
        return sums

    def summarize(self, sums: dict[str, Any], prefix: str = "") -> dict[str, float]:
        """Mean loss and accuracy per level; levels with nothing to predict are left out."""
        summary = {f"{prefix}loss": float(sums["loss"]) / max(float(sums["count"]), 1.0)}
        hits, counts = np.asarray(sums["hits"]), np.asarray(sums["level_count"])
        for level, (hit, count) in enumerate(zip(hits, counts, strict=True), start=1):
            if count > 0:
                summary[f"{prefix}accuracy/level_{level}"] = float(hit) / float(count)
        if "item_count" in sums:
            items = max(float(sums["item_count"]), 1.0)
            summary[f"{prefix}item_loss"] = float(sums["item_loss"]) / items
            if "item_hits" in sums:
                summary[f"{prefix}item_head_recall@10"] = float(sums["item_hits"]) / items
        return summary


def _cross_entropy(logits: jax.Array, target: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Of logits [..., V] and targets [...]: log of the sum, the target's logit, its rank from 1.

    Equal logits count against the target, or a model that says nothing would score full marks.
    """
    # Reductions over the vocabulary only, which may be sharded: no gather of the target's logit.
    token_V = jnp.arange(logits.shape[-1], dtype=target.dtype)
    is_target = constrain(token_V, "vocabulary") == target[..., None]
    target_logit = jnp.sum(jnp.where(is_target, logits, 0.0), axis=-1)
    rank = jnp.sum(logits >= target_logit[..., None], axis=-1)
    return jax.nn.logsumexp(logits, axis=-1), target_logit, rank


def _item_sums(
    model: SidLM, hidden_BSD: jax.Array, next_item_BS: jax.Array, with_hits: bool
) -> dict[str, jax.Array]:
    index_BP, items_BP = item_places(next_item_BS, model.vocabulary.levels)
    logits_BPI = model.item_head.logits(take_positions(hidden_BSD, index_BP))
    total_BP, target_BP, rank_BP = _cross_entropy(logits_BPI, items_BP)
    there_BP = (items_BP >= 0).astype(jnp.float32)
    sums = {
        "item_loss": jnp.sum((total_BP - target_BP) * there_BP),
        "item_count": jnp.sum(there_BP),
    }
    if with_hits:
        sums["item_hits"] = jnp.sum((rank_BP <= 10) * there_BP)
    return sums


def _token_sums(
    logits_BSV: jax.Array,
    tokens_BS: jax.Array,
    mask_BS: jax.Array,
    vocabulary: Vocabulary,
    smoothing: float,
) -> dict[str, jax.Array]:
    target_BS = jnp.pad(tokens_BS[:, 1:], ((0, 0), (0, 1)))
    total_BS, target_logit_BS, rank_BS = _cross_entropy(logits_BSV, target_BS)
    wanted_BS = target_logit_BS
    if smoothing:
        wanted_BS = (1 - smoothing) * wanted_BS + smoothing * jnp.mean(logits_BSV, axis=-1)
    loss_BS = total_BS - wanted_BS
    hit_BS = (rank_BS == 1) * mask_BS
    target_level_BS, _ = vocabulary.level_and_code(target_BS)
    by_level = [(target_level_BS == level) for level in range(1, vocabulary.levels + 1)]
    return {
        "loss": jnp.sum(loss_BS * mask_BS),
        "count": jnp.sum(mask_BS),
        "hits": jnp.stack([jnp.sum(hit_BS * at) for at in by_level]),
        "level_count": jnp.stack([jnp.sum(mask_BS * at) for at in by_level]),
    }
