"""Stage 1 of the paper: the SID encoder alone learns to predict each next code."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import jax
from flax import nnx

from prefixmem_jax.data.batch import Batch
from prefixmem_jax.errors import UserError
from prefixmem_jax.models.prefix_classifier import PrefixClassifier
from prefixmem_jax.objectives.next_token import NextToken
from prefixmem_jax.semantic_ids.vocabulary import Vocabulary


@dataclass(frozen=True)
class Classification(NextToken):
    """Next-token prediction where the SID encoder is active, from its vector and nothing else.

    There the histories' transitions c_1..c_l -> c_{l+1} occur as often as in training histories,
    which is the paper's weighting.
    """

    generates: ClassVar[bool] = False
    exports: ClassVar[bool] = False

    def check(self, config: Any) -> None:
        super().check(config)
        if config.sid_encoder is None:
            raise UserError(
                "objective=classification trains the SID encoder, and sid_encoder is none"
            )
        if config.item_head is not None:
            raise UserError("objective=classification scores no items; expected item_head=none")

    def build_model(self, config: Any, vocabulary: Vocabulary, rngs: nnx.Rngs) -> PrefixClassifier:
        shape = config.sid_encoder, config.model.d_model, vocabulary
        return PrefixClassifier(*shape, sids_alone=self.sids_alone, rngs=rngs)

    def predicted(self, model: nnx.Module, batch: Batch) -> jax.Array:
        return batch.loss_mask * model.sid_encoder.active(batch.tokens, batch.segment_ids)
