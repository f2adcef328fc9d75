"""Trainers and batches for benchmarks: random SIDs of 5 levels, no data files."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from prefixmem_jax.config import Config, DataConfig, DecoderConfig, PrefixMemoryConfig
from prefixmem_jax.memory.table import spread
from prefixmem_jax.parallel.mesh import make_mesh
from prefixmem_jax.parallel.sharding import batch_sharding
from prefixmem_jax.semantic_ids.space import SPECIAL_TOKENS, SidSpace
from prefixmem_jax.objectives.next_token import build_model, next_token_sums
from prefixmem_jax.training.optimizers import clip_scale, dense_optimizer, memory_optimizer
from prefixmem_jax.training.step import Trainer

# Decoders by name: the quickstart's, and the one that the paper pre-trains with.
DECODERS = {
    "quickstart": (DecoderConfig(), 0),
    "qwen3-0.6b": (
        DecoderConfig(
            layers=28,
            d_model=1024,
            d_ff=3072,
            query_heads=16,
            kv_heads=8,
            head_dim=128,
            tied_embeddings=True,
            rope_base=1e6,
            compute_dtype="bfloat16",
            remat=True,
        ),
        151_936,
    ),
}


def one_device_trainer(
    decoder: str,
    encoder: PrefixMemoryConfig | None,
    batch: int,
    length: int,
    codes: int,
) -> Trainer:
    """A trainer on one device."""
    model, text_tokens = DECODERS[decoder]
    space = SidSpace((codes,) * 5, text_tokens + SPECIAL_TOKENS)
    data = DataConfig(sequence_length=length, batch_size=batch)
    config = Config("benchmark", encoder=encoder, data=data, model=model)
    return Trainer.create(config, space, make_mesh(devices=jax.devices()[:1]))


def random_batches(trainer: Trainer, count: int) -> list[dict[str, jax.Array]]:
    """Batches of random items, in the layout of `data.sequences`."""
    rng = np.random.default_rng(0)
    data, space = trainer.config.data, trainer.space
    items = (data.sequence_length - 1) // space.levels
    sharding = batch_sharding(trainer.mesh)
    found = []
    for _ in range(count):
        sids = rng.integers(0, space.codebook_sizes[0], (data.batch_size, items, space.levels))
        tokens = np.zeros((data.batch_size, data.sequence_length), np.int32)
        tokens[:, 0] = space.bos_token
        tokens[:, 1 : 1 + space.levels * items] = space.encode(sids).reshape(len(tokens), -1)
        segments = (tokens > 0).astype(np.int32)
        positions = np.broadcast_to(np.arange(tokens.shape[1], dtype=np.int32), tokens.shape)
        batch = {"tokens": tokens, "segment_ids": segments, "positions": positions}
        batch["loss_mask"] = segments.astype(np.float32)
        found.append({name: jax.device_put(array, sharding) for name, array in batch.items()})
    return found


def training(trainer: Trainer, batches: list[dict[str, jax.Array]]) -> Callable[[], Any]:
    """A function that makes one train step each time it is called."""
    step = trainer.compile_train_step()
    return _repeated(lambda state, batch: step(state, batch)[0], trainer.init_sharded(0), batches)


def dense_training(trainer: Trainer, batches: list[dict[str, jax.Array]]) -> Callable[[], Any]:
    """The same with the table as one more parameter: a gradient for all of it, and dense AdamW."""
    config, table = trainer.config, trainer.table
    optimizers = dense_optimizer(config), memory_optimizer(config)

    def loss(params: Any, memory: jax.Array, batch: dict[str, jax.Array]) -> jax.Array:
        model = trainer.model(params)
        addresses = model.encoder.addresses(batch["tokens"], batch["segment_ids"])
        sums = next_token_sums(model, batch, table.lookup(memory, addresses))
        return sums["loss"] / sums["count"]

    def step(state: Any, batch: dict[str, jax.Array]) -> Any:
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

    start = jax.jit(trainer.init)(jax.random.key(0))  # no mesh
    state = ((start.params, start.memory), (start.optimizer, start.memory_optimizer))
    plain = [{name: np.asarray(array) for name, array in batch.items()} for batch in batches]
    return _repeated(jax.jit(step, donate_argnums=0), state, plain)


def table_training(
    trainer: Trainer, batches: list[dict[str, jax.Array]], dense: bool
) -> Callable[[], Any]:
    """The table's part of a step alone: read rows, take a gradient of them, update the table.

    Args:
      dense: gradient of the whole table and AdamW on all of it, instead of the batch's rows.
    """
    table, optimizer = trainer.table, memory_optimizer(trainer.config)
    encoder = jax.eval_shape(
        lambda: build_model(trainer.config, trainer.space, nnx.Rngs(0))
    ).encoder
    with jax.set_mesh(trainer.mesh):
        addresses = [encoder.addresses(b["tokens"], b["segment_ids"]) for b in batches]

    def row_wise_step(state: tuple, addresses: jax.Array) -> tuple:
        memory, optimizer_state = state
        fetched = table.fetch(memory, addresses)
        gradients = jax.grad(lambda rows: _loss(spread(fetched._replace(rows=rows))))(fetched.rows)
        merged = table.merge_gradients(fetched, gradients)
        scale = clip_scale(merged.squared_norm, 1.0)
        key = jax.random.key(0)
        return table.update(
            memory, optimizer_state, optimizer, fetched, gradients, merged, scale, key
        )

    def dense_step(state: tuple, addresses: jax.Array) -> tuple:
        memory, optimizer_state = state
        gradient = jax.grad(lambda memory: _loss(table.lookup(memory, addresses)))(memory)
        gradient *= clip_scale(jnp.sum(gradient**2), 1.0)
        updates, optimizer_state = optimizer.update(gradient, optimizer_state, memory)
        return memory + updates, optimizer_state

    def start(key: jax.Array) -> tuple:
        return table.init(key), table.init_optimizer(optimizer)

    if dense:
        state = jax.jit(start)(jax.random.key(0))
        plain = [np.asarray(x) for x in addresses]
        return _repeated(jax.jit(dense_step, donate_argnums=0), state, plain)
    abstract = trainer.abstract_state()
    shardings = jax.tree.map(lambda x: x.sharding, (abstract.memory, abstract.memory_optimizer))
    with jax.set_mesh(trainer.mesh):
        state = jax.jit(start, out_shardings=shardings)(jax.random.key(0))
        step = jax.jit(row_wise_step, donate_argnums=0).lower(state, addresses[0]).compile()
    return _repeated(step, state, addresses)


def _loss(rows: jax.Array) -> jax.Array:
    return jnp.sum(jnp.sin(rows))


def _repeated(step: Callable, state: Any, batches: list[Any]) -> Callable[[], Any]:
    held, calls = [state], [0]

    def call() -> Any:
        held[0] = step(held[0], batches[calls[0] % len(batches)])
        calls[0] += 1
        return held[0]

    return call
