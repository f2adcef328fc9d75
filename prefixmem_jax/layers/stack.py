"""How a stack of layers is run, and what the backward pass computes again of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax

from prefixmem_jax.config_groups import DecoderConfig
from prefixmem_jax.layers.splash_attention import ATTENDED
from prefixmem_jax.layers.transformer import ROTATED, WIDENED
from prefixmem_jax.parallel.sharding import PRODUCT

# So few layers compile fast without a loop, and their gradients run faster.
UNROLLED_LAYERS = 4
# What the backward pass finds kept, by `DecoderConfig.remat`.
_policies, _PRODUCTS = jax.checkpoint_policies, (PRODUCT, WIDENED, ROTATED, ATTENDED)
_KEPT = {
    "full": _policies.nothing_saveable,
    "mlp": _policies.save_only_these_names(WIDENED),
    "dots": _policies.save_only_these_names(*_PRODUCTS),
    "offload": _policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[],
        names_which_can_be_offloaded=list(_PRODUCTS),
        offload_src="device",
        offload_dst="pinned_host",
    ),
}


def run_layers(
    layer: Callable[[jax.Array, Any], tuple[jax.Array, Any]],
    x: jax.Array,
    by_layer: Any,
    config: DecoderConfig,
) -> tuple[jax.Array, Any]:
    """Runs layers one after the other.

    A loop keeps what the backward pass needs of all layers in one array, from which it copies each
    layer's; layers without one are compiled each by itself.

    Args:
      layer: of x and what is one layer's own; gives the next x, and what to hand out of the layer.
      by_layer: what is the layers' own, arrays [L, ...].

    Returns:
      The last layer's x, and what each handed out, [L, ...].
    """
    if config.remat != "none":
        layer = jax.checkpoint(layer, policy=_KEPT[config.remat])
    count = len(jax.tree.leaves(by_layer)[0])
    in_loop = config.scan_layers and count > UNROLLED_LAYERS
    return jax.lax.scan(layer, x, by_layer, unroll=1 if in_loop else count)
