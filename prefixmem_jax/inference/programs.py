"""What an engine compiles: a model at work on a batch of users, each device on its own.

`trace_search` traces the search without parameters or a catalogue, to plan for devices that are
not there.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from prefixmem_jax.data.batch import Batch
from prefixmem_jax.data.documents.items import document_length
from prefixmem_jax.inference.beam_search import Beams, beam_search
from prefixmem_jax.inference.cached_sid_lm import CachedSidLM, RowsAt, rows_for
from prefixmem_jax.inference.item_prior import Returning
from prefixmem_jax.inference.sampling import generate
from prefixmem_jax.inference.transition_prior import TransitionTable, transition_prior
from prefixmem_jax.memory.table import Table
from prefixmem_jax.model_spec import ModelSpec
from prefixmem_jax.models.sid_lm import SidLM
from prefixmem_jax.parallel.mesh import AXES
from prefixmem_jax.parallel.sharding import row_spec
from prefixmem_jax.semantic_ids.trie import TrieLevel, largest_levels

BY_USER = P(AXES)
NEIGHBOURS = 64  # of an item that are looked at, the most frequent


class Program(NamedTuple):
    """What is compiled: equal ones are one program, of however many engines."""

    graphdef: nnx.GraphDef
    table: Table | None
    mesh: Mesh
    function: Callable
    static: tuple[tuple[str, Any], ...]


@partial(jax.jit, static_argnames="program")
def run_on_all_devices(program: Program, params: Any, memory: Any, shared: Any, users: Any) -> Any:
    def local(params, memory, shared, users):
        rows_at = None
        if program.table is not None:
            rows_at = partial(program.table.gather_by_exchange, memory)
        model = nnx.merge(program.graphdef, nnx.State(params))
        return program.function(model, rows_at, *shared, *users, **dict(program.static))

    return jax.shard_map(
        local,
        mesh=program.mesh,
        in_specs=(P(), row_spec(), P(), BY_USER),
        out_specs=BY_USER,
        check_vma=False,  # TPUs' attention kernel does not say over which axes its output varies
    )(params, memory, shared, users)


class SharedBySearches(NamedTuple):
    """What the searches of all users share; nothing of it in a search over all codes.

    Attributes:
      trie: `Trie.levels`; groups: leaf of every item, int32 [items], where items are scored too.
      item_share: see `EvaluationConfig`; items: the vectors [items, D] of an item head that reads
        the memory.
      transitions, transition_share: what followed in training, and its share.
      returns: how often users come back to an item; zero leaves out what they have had.
    """

    trie: list[TrieLevel] | None = None
    groups: jax.Array | None = None
    item_share: jax.Array | None = None
    items: jax.Array | None = None
    transitions: TransitionTable | None = None
    transition_share: jax.Array | None = None
    returns: jax.Array | None = None


def search(
    model: SidLM,
    rows_at: RowsAt | None,
    shared: SharedBySearches,
    prompts: Batch,
    seen: jax.Array | None,
    recent: jax.Array | None,
    *,
    beams: int,
) -> Beams:
    """`beam_search` with what is known of the catalogue and of the users.

    Args:
      seen: leaves that a user has had, int32 [users, any], which come as often as `shared.returns`
        says, None where it says nothing; recent: their last items, int32 [users, any], where
        transitions count. -1 for none.
    """
    transitions = returning = None
    if shared.returns is not None:
        returning = Returning(seen, shared.returns)
    if shared.transitions is not None:
        transitions = transition_prior(
            shared.transitions,
            recent,
            returning,
            shared.groups,
            shared.trie,
            shared.transition_share,
        )
    return beam_search(
        CachedSidLM(model, rows_at, shared.items),
        prompts,
        beams,
        shared.trie,
        returning,
        None if shared.item_share is None else shared.groups,
        shared.item_share,
        transitions,
    )


def room_for_seen(most: int) -> int:
    """Of so many SIDs that a user has seen: a length of few, since each is compiled."""
    return 1 << (most - 1).bit_length()


def trace_search(spec: ModelSpec) -> tuple[jax.stages.Traced, int]:
    """The search for one batch of users with the longest histories, traced; and how many users.

    Over the catalogue where the number of its items is known; its trie then has as many nodes as
    there can be.
    """
    spec = spec.in_loops()
    options, vocabulary = spec.config.evaluation, spec.vocabulary
    room, items = spec.config.data.max_items, vocabulary.items
    users = options.batch_size + -options.batch_size % spec.mesh.size

    def placed(partition: P, dtype: Any, *shape: int) -> jax.ShapeDtypeStruct:
        sharding = NamedSharding(spec.mesh, partition)
        return jax.ShapeDtypeStruct(shape, jnp.dtype(dtype), sharding=sharding)

    everywhere = partial(placed, P())
    a_user = partial(placed, BY_USER, jnp.int32, users)
    shared, seen, recent = SharedBySearches(), None, None
    if items:
        levels = largest_levels(items, vocabulary.space.codebook_sizes)
        levels = jax.tree.map(lambda x: everywhere(x.dtype, *x.shape), levels)
        shared = SharedBySearches(levels)
        if options.exclude_seen or options.transition_share > 0:
            shared = shared._replace(returns=everywhere(np.float32))
            seen = a_user(room_for_seen(room))
        if spec.config.item_head is not None or options.transition_share > 0:
            shared = shared._replace(groups=everywhere(np.int32, items))
        if spec.config.item_head is not None:
            shared = shared._replace(item_share=everywhere(np.float32))
            if spec.config.item_head.vectors == "memory":
                vectors = everywhere(np.float32, items, spec.config.model.d_model)
                shared = shared._replace(items=vectors)
        if options.transition_share > 0:
            recent = a_user(room)
            near = everywhere(np.int32, items, NEIGHBOURS)
            counts = everywhere(np.float32, items, NEIGHBOURS)
            shared = shared._replace(
                transitions=TransitionTable(near, counts, *[everywhere(np.float32)] * 2),
                transition_share=everywhere(np.float32),
            )
    length = document_length(vocabulary.levels, room)
    prompts = Batch.abstract(users, length, NamedSharding(spec.mesh, BY_USER))
    static = (("beams", options.beam),)
    program = Program(spec.graphdef, spec.table, spec.mesh, search, static)
    by_user = prompts, seen, recent
    operands = spec.replicated(), spec.memory, (shared,), by_user
    return run_on_all_devices.trace(program, *operands), users


def target_ranks(model: SidLM, rows_at: RowsAt | None, batch: Batch) -> jax.Array:
    tokens, segments, levels = batch.tokens, batch.segment_ids, model.vocabulary.levels
    hidden, _ = model(batch, rows_for(model, rows_at, tokens, segments))
    first = jnp.sum(segments > 0, axis=1) - levels
    target = jnp.maximum(first[:, None] + jnp.arange(levels), 1)
    hidden = jnp.take_along_axis(hidden, target[..., None] - 1, axis=1)
    head = model.softmax_head()
    logits = head.logits(hidden)
    codes = jnp.take_along_axis(tokens, target, axis=1)
    true = jnp.take_along_axis(logits, codes[..., None] - head.first, axis=-1)
    return jnp.sum(logits >= true, axis=-1, dtype=jnp.int32)


def write(
    model: SidLM, rows_at: RowsAt | None, prompts: Batch, *, new_tokens: int, end_tokens: tuple
) -> jax.Array:
    return generate(model, rows_at, prompts, new_tokens, end_tokens)
