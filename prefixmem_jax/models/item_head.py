"""The item head: whole items scored where an item's first code is to come.

A softmax over items sees what codes level by level cannot say: which item followed which, of items
that share no code. It learns jointly with the codes, from the same hidden state.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from prefixmem_jax.config_groups import ItemHeadConfig
from prefixmem_jax.errors import UserError
from prefixmem_jax.memory.table import Lookup
from prefixmem_jax.models.negatives import draw
from prefixmem_jax.parallel.parameters import normal
from prefixmem_jax.parallel.sharding import (
    constrain,
    device_count,
    first_positions,
    gather_over_fsdp,
    over_all_devices,
    take_positions,
)
from prefixmem_jax.semantic_ids.vocabulary import Vocabulary
from prefixmem_jax.sid_encoders.sid_encoder import SidEncoder


class OwnVectors(nnx.Module):
    """One vector an item; part `item_head`."""

    def __init__(self, vocabulary: Vocabulary, d_model: int, *, rngs: nnx.Rngs):
        outputs = (vocabulary.item_outputs, "vocabulary")
        self.vectors = normal(rngs, 0.02, (d_model, "stored_model"), outputs)

    def candidates(self, encoder: SidEncoder | None, key: jax.Array | None) -> Lookup:
        """Nothing to look up."""
        del encoder, key
        return Lookup()

    def weight(self, encoder: SidEncoder | None, rows: Lookup, dtype: str) -> jax.Array:
        """Vectors of all items, in columns [D, outputs]."""
        del encoder, rows
        return gather_over_fsdp(self.vectors[...], dtype, None, "vocabulary")


class MemoryVectors(nnx.Module):
    """The vectors that a SID encoder has where items end; no parameters."""

    def __init__(self, vocabulary: Vocabulary, negatives: int | None):
        self.vocabulary = vocabulary
        self.negatives = negatives

    def candidates(self, encoder: SidEncoder, key: jax.Array | None) -> Lookup:
        """What to look up, to score all items, or a few drawn with the key (`Lookup.names`)."""
        vocabulary, drawn = self.vocabulary, None
        if vocabulary.sids is None:
            raise ValueError("the items' SIDs are not known; training wants `Vocabulary.sids`")
        # Behind the barrier the compiler takes no time to compute with a whole catalogue.
        tokens_IL = jax.lax.optimization_barrier(jnp.asarray(vocabulary.encode(vocabulary.sids)))
        if self.negatives is not None:
            key = jax.random.key(0) if key is None else key
            drawn = draw(vocabulary, key, self.negatives)
            tokens_IL = tokens_IL[drawn]
        missing = -len(tokens_IL) % device_count()
        tokens_IL = jnp.pad(tokens_IL, ((0, missing), (0, 0)))
        return Lookup(shared=item_addresses(encoder, over_all_devices(tokens_IL)), names=drawn)

    def weight(self, encoder: SidEncoder, rows: Lookup, dtype: str) -> jax.Array:
        """Vectors of the candidates, in columns [D, candidates]."""
        vectors_ID = item_vectors(encoder, rows.shared)
        return constrain(vectors_ID.astype(dtype).T, None, "vocabulary")


def item_addresses(encoder: SidEncoder, tokens_IL: jax.Array) -> jax.Array:
    """Memory rows of whole items: int32 [items, 1, any]; of tokens that are no SID, negative."""
    return encoder.addresses(tokens_IL, jnp.ones_like(tokens_IL), last=1)


def item_vectors(encoder: SidEncoder, rows_I1AW: jax.Array) -> jax.Array:
    """What the encoder adds to the embedding where items end: float32 [items, D]."""
    here = jnp.zeros(rows_I1AW.shape[:2], jnp.int32)
    return encoder(here, here, rows_I1AW, last=1)[:, 0]


def build_item_head(
    config: ItemHeadConfig, vocabulary: Vocabulary, d_model: int, rngs: nnx.Rngs
) -> OwnVectors | MemoryVectors:
    """The item head; raises UserError where the number of items is not known."""
    if not vocabulary.items:
        raise UserError("item_head needs the number of items; set data.path, or data.items")
    if config.vectors == "own":
        return OwnVectors(vocabulary, d_model, rngs=rngs)
    few = config.negatives is not None and config.negatives < vocabulary.items
    return MemoryVectors(vocabulary, config.negatives if few else None)


def item_places(next_item_BS: jax.Array, levels: int) -> tuple[jax.Array, jax.Array]:
    """Where items start next, and which: positions and items int32 [B, P].

    Args:
      next_item_BS: `data.batch.Batch.next_item`.

    Returns:
      P is the most items that a row has room for; places that are left over have item -1.
    """
    most = max((next_item_BS.shape[1] - 1) // levels, 1)
    index_BP, _ = first_positions(next_item_BS > 0, most)
    return index_BP, take_positions(next_item_BS, index_BP) - 1
