"""Optax transformations with one number of state per memory row.

`memory.table.Table.apply` applies any optax transformation to the rows in a batch. These two keep
their second moment once a row instead of once a number, as large embedding tables usually do:
for a row of w float32 numbers they need 4 bytes (Adagrad) or 4w + 4 (Adam) of state, where Adam
needs 8w.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax


class RowAdagradState(NamedTuple):
    """accumulator: float32 [rows], sum over steps of the row's mean squared gradient."""

    accumulator: jax.Array


def scale_by_row_adagrad(epsilon: float = 1e-8) -> optax.GradientTransformation:
    """Row-wise Adagrad: divides by the root of the summed mean square of the row's gradients."""

    def init(rows: jax.Array) -> RowAdagradState:
        return RowAdagradState(jnp.zeros(rows.shape[0], jnp.float32))

    def update(gradients: jax.Array, state: RowAdagradState, rows: jax.Array | None = None):
        del rows
        accumulator = state.accumulator + jnp.mean(gradients**2, axis=-1)
        scaled = gradients / (jnp.sqrt(accumulator)[:, None] + epsilon)
        return scaled, RowAdagradState(accumulator)

    return optax.GradientTransformation(init, update)


class RowAdamState(NamedTuple):
    """count: int32 []; mu: float32 [rows, width]; nu: float32 [rows]."""

    count: jax.Array
    mu: jax.Array
    nu: jax.Array


def scale_by_row_adam(
    beta1: float, beta2: float, epsilon: float = 1e-8
) -> optax.GradientTransformation:
    """Adam with one second moment a row: the mean square of the row's gradient."""

    def init(rows: jax.Array) -> RowAdamState:
        return RowAdamState(
            jnp.zeros([], jnp.int32), jnp.zeros_like(rows), jnp.zeros(rows.shape[0], jnp.float32)
        )

    def update(gradients: jax.Array, state: RowAdamState, rows: jax.Array | None = None):
        del rows
        count = optax.safe_increment(state.count)
        mu = beta1 * state.mu + (1 - beta1) * gradients
        nu = beta2 * state.nu + (1 - beta2) * jnp.mean(gradients**2, axis=-1)
        corrected = jnp.sqrt(nu / (1 - beta2**count))[:, None] + epsilon
        return (mu / (1 - beta1**count)) / corrected, RowAdamState(count, mu, nu)

    return optax.GradientTransformation(init, update)
