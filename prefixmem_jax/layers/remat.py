"""What the backward pass computes again of a stack of layers."""

from __future__ import annotations

from collections.abc import Callable

import jax

from prefixmem_jax.layers.splash_attention import ATTENDED
from prefixmem_jax.parallel.sharding import PRODUCT

# What it finds kept, by `DecoderConfig.remat`.
_policies = jax.checkpoint_policies
_KEPT = {
    "full": _policies.nothing_saveable,
    "dots": _policies.save_only_these_names(PRODUCT, ATTENDED),
    "offload": _policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[],
        names_which_can_be_offloaded=[PRODUCT, ATTENDED],
        offload_src="device",
        offload_dst="pinned_host",
    ),
}


def recomputed(layer: Callable, remat: str) -> Callable:
    """A layer of which the backward pass keeps what `DecoderConfig.remat` says."""
    return layer if remat == "none" else jax.checkpoint(layer, policy=_KEPT[remat])
