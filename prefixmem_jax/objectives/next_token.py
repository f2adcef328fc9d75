"""What a stage learns: which model is built, and the loss over its next-token logits."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from prefixmem_jax.config import Config
from prefixmem_jax.sid_encoders.prefix_memory import check_encoder
from prefixmem_jax.models.prefix_classifier import PrefixClassifier
from prefixmem_jax.models.sid_lm import SidLM
from prefixmem_jax.parallel.sharding import constrain
from prefixmem_jax.semantic_ids.space import SidSpace

Model = SidLM | PrefixClassifier


def build_model(config: Config, space: SidSpace, rngs: nnx.Rngs) -> Model:
    """The model that the config's objective trains."""
    if config.encoder is not None:
        check_encoder(config.encoder, space)
    if config.objective == "classification":
        return PrefixClassifier(config.encoder, config.model.d_model, space, rngs=rngs)
    return SidLM(config.model, config.encoder, space, rngs=rngs)


def next_token_sums(
    model: Model, batch: dict[str, jax.Array], memory_rows: jax.Array | None
) -> dict[str, jax.Array]:
    """Cross-entropy and hits of next-token prediction, as sums over the batch.

    `classification` learns only where the encoder is active: there the histories' transitions
    c_1..c_l -> c_{l+1} occur as often as in training histories, which is the paper's weighting.

    Args:
      batch: see `data.sequences`.

    Returns:
      loss: float32 [], summed over predicted positions; count: their number.
      hits, level_count: float32 [levels], by level of the predicted token (top-1 over the whole
      vocabulary).
    """
    logits_BSV = model.next_token_logits(
        batch["tokens"], batch["segment_ids"], batch["positions"], memory_rows
    )
    mask_BS = batch["loss_mask"]
    space = model.space
    if isinstance(model, PrefixClassifier):
        addresses = model.encoder.addresses(batch["tokens"], batch["segment_ids"])
        mask_BS = mask_BS * jnp.any(addresses >= 0, axis=-1)
    with jax.named_scope("loss"):
        return _cross_entropy_sums(logits_BSV, batch["tokens"], mask_BS, space)


def _cross_entropy_sums(
    logits_BSV: jax.Array, tokens_BS: jax.Array, mask_BS: jax.Array, space: SidSpace
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
    target_level_BS, _ = space.level_and_code(target_BS)
    by_level = [(target_level_BS == level) for level in range(1, space.levels + 1)]
    return {
        "loss": jnp.sum(loss_BS * mask_BS),
        "count": jnp.sum(mask_BS),
        "hits": jnp.stack([jnp.sum(hit_BS * at) for at in by_level]),
        "level_count": jnp.stack([jnp.sum(mask_BS * at) for at in by_level]),
    }
