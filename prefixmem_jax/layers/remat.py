"""What the backward pass computes again of a stack of layers."""

from __future__ import annotations

from collections.abc import Callable

import jax

from prefixmem_jax.layers.splash_attention import ATTENDED

# What it finds kept, by `DecoderConfig.remat`.
_policies = jax.checkpoint_policies
_KEPT = {
    "full": _policies.nothing_saveable,
    "dots": _policies.save_from_both_policies(
        _policies.dots_with_no_batch_dims_saveable, _policies.save_only_these_names(ATTENDED)
    ),
    "offload": _policies.offload_dot_with_no_batch_dims("device", "pinned_host"),
}


def recomputed(layer: Callable, remat: str) -> Callable:
    """A layer of which the backward pass keeps what `DecoderConfig.remat` says."""
    return layer if remat == "none" else jax.checkpoint(layer, policy=_KEPT[remat])
