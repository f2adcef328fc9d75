"""Next-token prediction over packed documents: the decoder, with its SID encoder if it has one."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Annotated, Any, ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from pydantic import Field

from prefixmem_jax.config_groups import DataConfig, Rate
from prefixmem_jax.data.batch import Batch
from prefixmem_jax.data.documents.document import Corpus, DocumentsConfig, mixture
from prefixmem_jax.data.documents.items import Items, document_length, example_documents
from prefixmem_jax.data.packing import one_per_row, pack
from prefixmem_jax.data.prepare import PreparedData, fixed_sample
from prefixmem_jax.errors import UserError
from prefixmem_jax.kinds import kind_name
from prefixmem_jax.layers.softmax_head import (
    SoftmaxHead,
    cross_entropy,
    sampled_cross_entropy,
)
from prefixmem_jax.memory.table import Lookup
from prefixmem_jax.models.decoder import Decoder
from prefixmem_jax.models.item_head import item_places
from prefixmem_jax.models.negatives import expected
from prefixmem_jax.models.sid_lm import SidLM
from prefixmem_jax.objectives.objective import Objective
from prefixmem_jax.parallel.sharding import constrain, take_positions
from prefixmem_jax.semantic_ids.vocabulary import Vocabulary


@dataclass(frozen=True)
class NextToken(Objective):
    """Cross-entropy of every next token of the documents, and of every next item if there is an
    item head.

    Attributes:
      documents: kinds of documents (`data/documents/`); validation is on histories of SIDs.
      label_smoothing: share of a target's probability that is spread evenly over the softmax.
      softmax: over the whole vocabulary, or over the tokens of SIDs alone, where documents have
        nothing else to predict. The text's part, which is most of an LLM's, then costs nothing; a
        search compares codes of one level in either case.
    """

    documents: Annotated[tuple[DocumentsConfig, ...], Field(min_length=1)] = field(
        default=(Items(),), kw_only=True
    )
    label_smoothing: Rate = field(default=0.0, kw_only=True)
    softmax: Literal["vocabulary", "sids"] = field(default="vocabulary", kw_only=True)
    generates: ClassVar[bool] = True
    exports: ClassVar[bool] = True

    @property
    def documents_per_row(self) -> int | None:
        """The most that are packed together; None: as many as fit."""
        return None

    @property
    def sids_alone(self) -> bool:
        return self.softmax == "sids"

    def check(self, config: Any) -> None:
        del config
        texts = [one for one in self.documents if not one.sids_alone]
        if self.sids_alone and texts:
            raise UserError(
                f"objective.softmax=sids: documents of kind {kind_name(type(texts[0]))} have text "
                "to predict; expected vocabulary"
            )

    def build_model(self, config: Any, vocabulary: Vocabulary, rngs: nnx.Rngs) -> SidLM:
        data, levels = config.data, vocabulary.levels
        longest = [document_length(levels, data.max_items + 1)]  # of validation and inference
        longest += [documents.longest(data, levels) for documents in self.documents]
        llm = Decoder(config.model, vocabulary.size, max(longest), rngs=rngs)
        attached = config.sid_encoder, vocabulary, config.item_head
        return SidLM(llm, *attached, sids_alone=self.sids_alone, rngs=rngs)

    def abstract_batch(
        self, data: DataConfig, sharding: jax.sharding.Sharding | None = None
    ) -> Batch:
        return Batch.abstract(data.batch_size, data.sequence_length, sharding)

    def training_rows(self, corpus: Corpus, seed: int) -> Batch:
        drawn = seed if corpus.parts == 1 else [seed, corpus.part]
        documents = mixture(self.documents, corpus, drawn)
        return pack(documents, corpus.config.sequence_length, drawn, self.documents_per_row)

    @property
    def mixes_documents(self) -> bool:
        return len(self.documents) > 1

    def count_documents(self, corpus: Corpus) -> tuple[int, ...]:
        rng = np.random.default_rng(0)  # what is drawn changes no number
        return tuple(len(kind.documents(corpus, rng)) for kind in self.documents)

    @property
    def rows_depend_on(self) -> Any:
        return [{"kind": kind_name(type(one)), **asdict(one)} for one in self.documents]

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
        self, model: nnx.Module, batch: Batch, rows: Lookup, key: jax.Array | None
    ) -> dict[str, jax.Array]:
        """Cross-entropy and hits, as sums over the batch.

        Returns:
          loss: float32 [], summed over predicted positions by weight; count: their weights' sum.
          hits, level_count: float32 [levels], by level of the predicted token (top-1 of the
          softmax). With an item head item_loss, which is part of loss, item_count, and in
          validation item_hits (top-10).
        """
        hidden_BSD, head = model.predict(batch, rows.by_position, key)
        mask_BS = self.predicted(model, batch)
        target_BS = jnp.pad(batch.tokens[:, 1:], ((0, 0), (0, 1)))
        smoothing = 0.0 if key is None else self.label_smoothing
        loss, hit_BS = cross_entropy(hidden_BSD, head, target_BS, mask_BS, smoothing)
        level_BS, _ = model.vocabulary.level_and_code(target_BS)
        by_level = [(level_BS == at) * mask_BS for at in range(1, model.vocabulary.levels + 1)]
        sums = {
            "loss": loss,
            "count": jnp.sum(mask_BS),
            "hits": jnp.stack([jnp.sum(hit_BS * at) for at in by_level]),
            "level_count": jnp.stack([jnp.sum(at) for at in by_level]),
        }
        if model.item_head is not None:
            sums |= _item_sums(model, hidden_BSD, batch, mask_BS, rows, in_training=key is not None)
            sums["loss"] += model.item_weight * sums["item_loss"]
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


@jax.named_scope("item_head")
def _item_sums(
    model: SidLM,
    hidden_BSD: jax.Array,
    batch: Batch,
    mask_BS: jax.Array,
    rows: Lookup,
    in_training: bool,
) -> dict[str, jax.Array]:
    next_item_BS = jnp.where(mask_BS > 0, batch.next_item, 0)
    index_BP, items_BP = item_places(next_item_BS, model.vocabulary.levels)
    weight_BP = take_positions(mask_BS, index_BP)
    there_BP = jnp.where(items_BP >= 0, weight_BP, 0.0)
    sums = {"item_count": jnp.sum(there_BP)}
    hidden_BPD = take_positions(hidden_BSD, index_BP)
    weight_DI = model.item_head.weight(model.sid_encoder, rows, hidden_BSD.dtype)
    if rows.names is None:
        head = SoftmaxHead(weight_DI, outputs=model.vocabulary.items)
        best = 1 if in_training else 10
        sums["item_loss"], hit_BP = cross_entropy(hidden_BPD, head, items_BP, there_BP, best=best)
        if not in_training:
            sums["item_hits"] = jnp.sum(hit_BP * there_BP)
        return sums
    # The vector of the item to come is what the memory says where that item ends.
    memory_BSD = model.sid_encoder(batch.tokens, batch.segment_ids, rows.by_position)
    last_BP = jnp.minimum(index_BP + model.vocabulary.levels, batch.tokens.shape[1] - 1)
    target_BPD = take_positions(constrain(memory_BSD, "batch", None, None), last_BP)
    times_N = expected(model.vocabulary, rows.names, len(rows.names))
    sums["item_loss"] = sampled_cross_entropy(
        hidden_BPD, target_BPD, weight_DI, items_BP, rows.names, times_N, there_BP
    )
    return sums
