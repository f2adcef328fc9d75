"""The item head: whole items scored where an item's first code is to come.

A softmax over items sees what codes level by level cannot say: which item followed which, of items
that share no code. It learns jointly with the codes, from the same hidden state.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from prefixmem_jax.config_groups import ItemHeadConfig
from prefixmem_jax.layers.softmax_head import SoftmaxHead
from prefixmem_jax.parallel.parameters import normal
from prefixmem_jax.parallel.sharding import gather_over_fsdp, take_positions
from prefixmem_jax.semantic_ids.vocabulary import Vocabulary


class ItemHead(nnx.Module):
    """One vector an item; part `item_head`."""

    def __init__(
        self, config: ItemHeadConfig, vocabulary: Vocabulary, d_model: int, *, rngs: nnx.Rngs
    ):
        self.items = vocabulary.items
        self.weight = config.weight
        outputs = (vocabulary.item_outputs, "vocabulary")
        self.vectors = normal(rngs, 0.02, (d_model, "stored_model"), outputs)

    def softmax_head(self, dtype: str) -> SoftmaxHead:
        """What scores items."""
        weight = gather_over_fsdp(self.vectors[...], dtype, None, "vocabulary")
        return SoftmaxHead(weight, outputs=self.items)


def item_places(next_item_BS: jax.Array, levels: int) -> tuple[jax.Array, jax.Array]:
    """Where items start next, and which: positions and items int32 [B, P].

    Args:
      next_item_BS: `data.batch.Batch.next_item`.

    Returns:
      P is the most items that a row has room for; places that are left over have item -1.
    """
    most = max((next_item_BS.shape[1] - 1) // levels, 1)
    starts_BS = (next_item_BS > 0).astype(jnp.int32)
    _, index_BP = jax.lax.top_k(starts_BS, most)  # of equals, the earlier ones
    items_BP = take_positions(next_item_BS[..., None], index_BP)[..., 0] - 1
    return index_BP, items_BP
