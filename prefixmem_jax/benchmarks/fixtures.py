"""Models and batches for benchmarks: random SIDs, no data files."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from prefixmem_jax.config import Config
from prefixmem_jax.config_files import load_config
from prefixmem_jax.config_groups import DataConfig, DecoderConfig, ItemHeadConfig
from prefixmem_jax.data.batch import Batch
from prefixmem_jax.memory.table import Lookup, spread
from prefixmem_jax.model_spec import ModelSpec
from prefixmem_jax.parallel.mesh import make_mesh
from prefixmem_jax.parallel.sharding import batch_sharding
from prefixmem_jax.semantic_ids.space import SidSpace
from prefixmem_jax.semantic_ids.vocabulary import Vocabulary
from prefixmem_jax.sid_encoders.sid_encoder import SidEncoderConfig
from prefixmem_jax.training.optimizers import clip_scale, dense_optimizer, memory_optimizer
from prefixmem_jax.training.state import abstract_state, init_sharded, init_state
from prefixmem_jax.training.step import compile_train_step


def _published(name: str) -> tuple[DecoderConfig, int]:
    """Of `configs/models`, without its recomputation: one device that holds it holds that too."""
    config = load_config(f"models/{name}", [])
    return dataclasses.replace(config.model, remat="none"), config.data.text_tokens


# Decoders by name, each with the text tokens of its vocabulary: a small one, the quickstart's, the
# one that the paper pre-trains with, and the next larger.
DECODERS = {
    "4-layer": (
        DecoderConfig(layers=4, d_model=256, d_ff=1024, query_heads=8, kv_heads=4, head_dim=32),
        0,
    ),
    "quickstart": (DecoderConfig(), 0),
    "qwen3-0.6b": _published("qwen3_0p6b"),
    "qwen3-1.7b": _published("qwen3_1p7b"),
}


def one_device_model(
    decoder: str,
    sid_encoder: SidEncoderConfig | None,
    batch: int,
    length: int,
    codes: int,
    item_head: ItemHeadConfig | None = None,
    items: int = 0,
    levels: int = 5,
) -> ModelSpec:
    """A model on one device; of a catalogue of random SIDs, if `items` are named."""
    model, text_tokens = DECODERS[decoder]
    space = SidSpace((codes,) * levels)
    rng = np.random.default_rng(0)
    sids = rng.integers(0, codes, (items, levels), np.int32) if items else None
    vocabulary = Vocabulary(space, text_tokens, items=items, sids=sids)
    data = DataConfig(sequence_length=length, batch_size=batch)
    config = Config(
        "benchmark", sid_encoder=sid_encoder, item_head=item_head, data=data, model=model
    )
    return ModelSpec.create(config, vocabulary, make_mesh(devices=jax.devices()[:1]))


def random_documents(
    vocabulary: Vocabulary, rows: int, items: int, length: int, rng: np.random.Generator
) -> Batch:
    """One document of random items a row, on the host: of the catalogue, if there is one."""
    sizes = vocabulary.space.codebook_sizes
    sids = np.stack([rng.integers(0, size, (rows, items)) for size in sizes], axis=-1)
    named = np.zeros((rows, items), np.int64)
    if vocabulary.sids is not None:
        named = rng.integers(0, vocabulary.items, (rows, items))
        sids = vocabulary.sids[named]
    batch = Batch.zeros(rows, length)
    batch.tokens[:, 0] = vocabulary.bos_token
    used = 1 + vocabulary.levels * items
    batch.tokens[:, 1:used] = vocabulary.encode(sids).reshape(rows, -1)
    batch.segment_ids[:, :used] = 1
    batch.positions[:] = np.arange(length)
    batch.loss_mask[:, : used - 1] = 1
    if vocabulary.sids is not None:
        batch.next_item[:, : used - 1 : vocabulary.levels] = 1 + named
    return batch


def random_batches(spec: ModelSpec, count: int) -> list[Batch]:
    """Batches of random items, on the model's mesh."""
    rng = np.random.default_rng(0)
    data = spec.config.data
    items = (data.sequence_length - 1) // spec.vocabulary.levels
    sharding = batch_sharding(spec.mesh)
    rows, length = data.batch_size, data.sequence_length
    return [
        jax.device_put(random_documents(spec.vocabulary, rows, items, length, rng), sharding)
        for _ in range(count)
    ]


def training(spec: ModelSpec, batches: list[Batch]) -> Callable[[], Any]:
    """A function that makes one train step each time it is called."""
    step = compile_train_step(spec)
    return _repeated(lambda state, batch: step(state, batch)[0], init_sharded(spec, 0), batches)


def dense_training(spec: ModelSpec, batches: list[Batch]) -> Callable[[], Any]:
    """The same with the table as one more parameter: a gradient for all of it, and dense AdamW."""
    config, table = spec.config, spec.table
    optimizers = dense_optimizer(config), memory_optimizer(config)

    def loss(params: Any, memory: jax.Array, batch: Batch) -> jax.Array:
        model = spec.model(params)
        rows = Lookup(table.gather(memory, model.memory_addresses(batch).by_position))
        sums = config.objective.loss_sums(model, batch, rows, None)
        return sums["loss"] / sums["count"]

    def step(state: Any, batch: Batch) -> Any:
        trained, states = state
        gradients = jax.grad(loss, argnums=(0, 1))(*trained, batch)
        scale = clip_scale(optax.tree.norm(gradients, squared=True), config.optimizer.clip_norm)
        after = []
        for optimizer, gradient, old, was in zip(
            optimizers, gradients, states, trained, strict=True
        ):
            scaled = jax.tree.map(lambda g: g * scale, gradient)
            updates, new = optimizer.update(scaled, old, was)
            after.append((optax.apply_updates(was, updates), new))
        return tuple(zip(*after, strict=True))

    start = jax.jit(lambda key: init_state(spec, key))(jax.random.key(0))  # no mesh
    state = ((start.params, start.memory), (start.optimizer, start.memory_optimizer))
    plain = [jax.device_get(batch) for batch in batches]
    return _repeated(jax.jit(step, donate_argnums=0), state, plain)


def table_training(spec: ModelSpec, batches: list[Batch], dense: bool) -> Callable[[], Any]:
    """The table's part of a step alone: read rows, take a gradient of them, update the table.

    Args:
      dense: gradient of the whole table and AdamW on all of it, instead of the batch's rows.
    """
    table, optimizer = spec.table, memory_optimizer(spec.config)
    addresses = batch_addresses(spec, batches)

    def row_wise_step(state: tuple, addresses: jax.Array) -> tuple:
        memory, optimizer_state = state
        fetched = table.fetch(memory, Lookup(addresses))
        gradients = jax.grad(lambda rows: _loss(spread(fetched._replace(rows=rows)).by_position))(
            fetched.rows
        )
        merged = table.merge(fetched, gradients)
        scale, key = clip_scale(merged.squared_norm, 1.0), jax.random.key(0)
        *state, _ = table.apply(memory, optimizer_state, merged, optimizer, scale, key)
        return tuple(state)

    def dense_step(state: tuple, addresses: jax.Array) -> tuple:
        memory, optimizer_state = state
        gradient = jax.grad(lambda memory: _loss(table.gather(memory, addresses)))(memory)
        gradient *= clip_scale(jnp.sum(gradient**2), 1.0)
        updates, optimizer_state = optimizer.update(gradient, optimizer_state, memory)
        return memory + updates, optimizer_state

    def start(key: jax.Array) -> tuple:
        return table.init(key), table.init_optimizer(optimizer)

    if dense:
        state = jax.jit(start)(jax.random.key(0))
        plain = [np.asarray(x) for x in addresses]
        return _repeated(jax.jit(dense_step, donate_argnums=0), state, plain)
    abstract = abstract_state(spec)
    shardings = jax.tree.map(lambda x: x.sharding, (abstract.memory, abstract.memory_optimizer))
    state = jax.jit(start, out_shardings=shardings)(jax.random.key(0))
    with jax.set_mesh(spec.mesh):
        step = jax.jit(row_wise_step, donate_argnums=0).lower(state, addresses[0]).compile()
    return _repeated(step, state, addresses)


def batch_addresses(spec: ModelSpec, batches: list[Batch]) -> list[jax.Array]:
    """The memory's addresses of batches."""
    params = init_sharded(spec, 0).params
    with jax.set_mesh(spec.mesh):
        model = spec.model(params)
        return [model.memory_addresses(batch).by_position for batch in batches]


def _loss(rows: jax.Array) -> jax.Array:
    return jnp.sum(jnp.sin(rows))


def _repeated(step: Callable, state: Any, batches: list[Any]) -> Callable[[], Any]:
    held, calls = [state], [0]

    def call() -> Any:
        held[0] = step(held[0], batches[calls[0] % len(batches)])
        calls[0] += 1
        return held[0]

    return call
