"""Optimizers: AdamW for dense parameters, a row-wise one for memory rows, and their schedules."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax

from prefixmem_jax.config import Config
from prefixmem_jax.config_groups import OptimizerConfig
from prefixmem_jax.memory.row_optimizers import scale_by_row_adagrad, scale_by_row_adam


def learning_rate(config: Config) -> optax.Schedule:
    """The dense parameters' rate: linear warm-up, then cosine decay to the last step."""
    options = config.optimizer
    return _schedule(config, options.learning_rate, options.warmup_steps, options.final_rate)


def memory_learning_rate(config: Config) -> optax.Schedule:
    """The memory rows' rate: a multiple of the dense one, with its own schedule if it has one."""
    dense, own = config.optimizer, config.optimizer.memory
    warmup = dense.warmup_steps if own.warmup_steps is None else own.warmup_steps
    final_rate = dense.final_rate if own.final_rate is None else own.final_rate
    return _schedule(config, own.rate * dense.learning_rate, warmup, final_rate)


def _schedule(config: Config, peak: float, warmup_steps: int, final_rate: float) -> optax.Schedule:
    warmup = min(warmup_steps, config.steps)
    return optax.warmup_cosine_decay_schedule(
        init_value=0.0,
        peak_value=peak,
        warmup_steps=warmup,
        decay_steps=max(config.steps, warmup + 1),
        end_value=peak * final_rate,
    )


# Dense parameters with a vector a token or an item.
_EMBEDDINGS = ("embedding", "head", "vectors")


def decay_group(path: tuple) -> str:
    """What a dense parameter counts as: `norm`, `embedding` or `matrix`."""
    names = [jax.tree_util.keystr((key,), simple=True) for key in path]
    if any("norm" in name for name in names):
        return "norm"
    return "embedding" if names[-1] in _EMBEDDINGS else "matrix"


def _weight_decay(options: OptimizerConfig) -> optax.GradientTransformation:
    """Decay of matrices and of embeddings, each at its own rate; norm scales are not decayed."""
    embedding = options.embedding_weight_decay
    rates = {
        "matrix": options.weight_decay,
        "embedding": options.weight_decay if embedding is None else embedding,
    }

    def mask(group: str, params: Any) -> Any:
        return jax.tree_util.tree_map_with_path(lambda path, _: decay_group(path) == group, params)

    return optax.chain(
        *(optax.add_decayed_weights(rate, partial(mask, group)) for group, rate in rates.items())
    )


def dense_optimizer(config: Config) -> optax.GradientTransformation:
    options = config.optimizer
    dtype = jnp.dtype(options.first_moment_dtype)
    return optax.chain(
        optax.scale_by_adam(options.beta1, options.beta2, options.epsilon, mu_dtype=dtype),
        _weight_decay(options),
        optax.scale_by_learning_rate(learning_rate(config)),
    )


def memory_optimizer(config: Config) -> optax.GradientTransformation:
    """Applied to the rows in the batch only (`memory.table.Table.apply`)."""
    options, memory = config.optimizer, config.optimizer.memory
    scaling = {
        "adam": lambda: optax.scale_by_adam(options.beta1, options.beta2, options.epsilon),
        "row_adam": lambda: scale_by_row_adam(options.beta1, options.beta2, options.epsilon),
        "adagrad": lambda: scale_by_row_adagrad(options.epsilon),
        "sgd": optax.identity,
    }[memory.kind]()
    return optax.chain(
        scaling,
        optax.add_decayed_weights(memory.weight_decay),
        optax.scale_by_learning_rate(memory_learning_rate(config)),
    )


def clip_scale(squared_norm: jax.Array, bound: float) -> jax.Array:
    """Factor that brings gradients of this squared global norm within the bound."""
    norm = jnp.sqrt(squared_norm)
    return jnp.where(norm > bound, bound / norm, 1.0)
