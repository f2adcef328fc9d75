"""Retrieval on held-out users while a run trains, by which its best checkpoint is chosen."""

from __future__ import annotations

from typing import Any

import jax

from prefixmem_jax.data.prepare import PreparedData, fixed_sample
from prefixmem_jax.data.transitions import Transitions
from prefixmem_jax.evaluation.metrics import beam_scores, groups_of
from prefixmem_jax.evaluation.statistics import means
from prefixmem_jax.inference.engine import Engine
from prefixmem_jax.model_spec import ModelSpec

CUTOFF = 10


class ValidationRetrieval:
    """Recommends to a fixed sample of the validation users, again and again."""

    def __init__(self, spec: ModelSpec, data: PreparedData, transitions: Transitions | None):
        options, everyone = spec.config.evaluation, data.split.validation
        examples = everyone.take(fixed_sample(len(everyone), options.validation_examples))
        self.histories, self.targets = examples.histories(), examples.targets
        self.options, self.catalog = options, data.catalog
        self.engine = Engine(spec, None, None, data.catalog, options.batch_size, transitions)
        wanted = spec.replicated()
        self._replicate = jax.jit(
            lambda params: jax.tree.map(lambda leaf, to: leaf.astype(to.dtype), params, wanted),
            out_shardings=jax.tree.map(lambda leaf: leaf.sharding, wanted),
        )

    def __call__(self, params: dict[str, Any], memory: jax.Array | None) -> dict[str, float]:
        """`item_recall@10` and `item_ndcg@10` of a model's parameters."""
        self.engine.use(self._replicate(params), memory)
        codes, _ = self.engine.search(
            self.histories,
            max(self.options.beam, CUTOFF),
            constrained=True,
            exclude_seen=self.options.exclude_seen,
        )
        self.engine.use(None, None)
        seen = self.histories if self.options.exclude_seen else None
        groups = groups_of(codes, self.catalog)
        scores = beam_scores(groups, self.targets, self.catalog, "", seen)
        return {
            f"item_{name}@{CUTOFF}": value
            for name in ("recall", "ndcg")
            for value in [means(scores)[f"item_{name}@{CUTOFF}/"]]
        }
