"""What the SID encoder costs in a whole train step."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax

from prefixmem_jax.benchmarks import torch_peer
from prefixmem_jax.benchmarks.fixtures import (
    DECODERS,
    one_device_model,
    random_batches,
    training,
)
from prefixmem_jax.benchmarks.timing import machine, median_seconds
from prefixmem_jax.config_groups import ItemHeadConfig
from prefixmem_jax.semantic_ids.space import SidSpace
from prefixmem_jax.semantic_ids.vocabulary import Vocabulary
from prefixmem_jax.sid_encoders.prefix_memory import PrefixMemoryConfig
from prefixmem_jax.training.flops import peak_flops
from prefixmem_jax.training.step import flops_once, trace_train_step

# Batch, length and codes per level by decoder: what fits the machines they are meant for.
SHAPES = {
    "4-layer": (40, 128, 256),
    "quickstart": (40, 128, 256),
    "qwen3-0.6b": (8, 1024, 2048),
    "qwen3-1.7b": (8, 1024, 2048),
}


def bench_step(
    decoder: str,
    rows: int,
    d_mem: int,
    repeats: int,
    items: int = 0,
    negatives: int = 1024,
    batch_size: int | None = None,
    peer: bool = False,
) -> dict[str, Any]:
    """Times a train step of a decoder without and with the SID encoder, on one device.

    Args:
      items: of a catalogue for an item head over the memory, which is then timed too; 0: none.
      negatives: that it draws in a step.
      batch_size: sequences in a step; None: what goes with the decoder.
      peer: also time Hugging Face's decoder of the same shape (`torch_peer`), first.

    Returns:
      machine, decoder, rows (per table), d_mem, tokens (per step).
      step_seconds: by `without` and `with` the SID encoder, and `item_head` with both.
      sid_encoder_overhead, item_head_overhead: seconds that each adds, as a share of the step
        without it.
      tokens_per_second: of all.
      flops: of matrix products in a step, nothing computed twice; mfu: at the device's published
        peak in bfloat16, where that is known.
      peer: what `torch_peer.time_step` found; peer_ratio: our tokens per second without the SID
        encoder over its.
    """
    usual, length, codes = SHAPES[decoder]
    batch = batch_size or usual
    shape = (batch, length, codes)
    beside = _peer(decoder, *shape, repeats) if peer else None
    memory = PrefixMemoryConfig(target_levels=(4, 5), orders=4, heads=4, rows=rows, d_mem=d_mem)
    models = {
        "without": one_device_model(decoder, None, *shape),
        "with": one_device_model(decoder, memory, *shape),
    }
    if items:
        reading = dataclasses.replace(memory, target_levels=(1, 4, 5), orders=5)
        head = ItemHeadConfig(vectors="memory", negatives=negatives)
        models["with"] = one_device_model(decoder, reading, *shape)
        models["item_head"] = one_device_model(decoder, reading, *shape, head, items)
    batches = random_batches(list(models.values())[-1], 8)
    with jax.set_mesh(models["with"].mesh):
        calls = {name: training(spec, batches) for name, spec in models.items()}
        flops = {name: flops_once(spec, trace_train_step(spec)) for name, spec in models.items()}
        seconds = median_seconds(calls, repeats, "train step")
    tokens = batch * length
    measured = {
        "machine": machine(),
        "decoder": decoder,
        "rows": rows,
        "d_mem": d_mem,
        "tokens": tokens,
        "step_seconds": seconds,
        "sid_encoder_overhead": seconds["with"] / seconds["without"] - 1,
        "tokens_per_second": {name: tokens / value for name, value in seconds.items()},
        "flops": flops,
    }
    if (peak := peak_flops(jax.devices()[0])) is not None:
        measured["mfu"] = {name: flops[name] / (peak * seconds[name]) for name in seconds}
    if items:
        overhead = seconds["item_head"] / seconds["with"] - 1
        measured |= {"items": items, "negatives": negatives, "item_head_overhead": overhead}
    if beside is not None:
        measured |= {"peer": beside, "peer_ratio": beside["seconds"] / seconds["without"]}
    return measured


def _peer(decoder: str, batch: int, length: int, codes: int, repeats: int) -> dict[str, Any]:
    """`torch_peer.time_step`, while JAX holds nothing on the device."""
    model, text_tokens = DECODERS[decoder]
    size = Vocabulary(SidSpace((codes,) * 5), text_tokens).size
    return torch_peer.time_step(model, size, batch, length, repeats)


def describe(measured: dict[str, Any]) -> str:
    """The measurements as text."""
    seconds = measured["step_seconds"]
    return "\n".join(
        [
            f"{measured['machine']['device']}, {measured['decoder']}, "
            f"{measured['tokens']:,} tokens a step",
            *(
                f"  step {name:8s} {seconds[name] * 1e3:9.1f} ms, "
                f"{measured['tokens_per_second'][name]:,.0f} tokens/s"
                + (f", MFU {100 * measured['mfu'][name]:.1f}%" if "mfu" in measured else "")
                for name in seconds
            ),
            f"  the SID encoder ({measured['rows']:,} rows per table, "
            f"d_mem {measured['d_mem']}) adds "
            f"{100 * measured['sid_encoder_overhead']:.1f}%",
            *(
                [
                    f"  the item head ({measured['items']:,} items, {measured['negatives']:,} of "
                    f"them in a step) adds {100 * measured['item_head_overhead']:.1f}%"
                ]
                if "items" in measured
                else []
            ),
            *(
                [
                    f"  Hugging Face's decoder under torch.compile ("
                    f"{measured['peer']['device']}, torch {measured['peer']['torch']}): "
                    f"{measured['peer']['seconds'] * 1e3:.1f} ms; ours has "
                    f"{measured['peer_ratio']:.2f} times its tokens/s"
                ]
                if "peer" in measured
                else []
            ),
        ]
    )


def panels(measured: dict[str, Any]) -> list[tuple[str, dict[str, float]]]:
    """What the plot shows."""
    shown = {"without": "without SID encoder", "with": "with SID encoder"}
    shown["item_head"] = "and item head"
    named = {shown[name]: 1e3 * value for name, value in measured["step_seconds"].items()}
    if "peer" in measured:
        named["torch.compile"] = 1e3 * measured["peer"]["seconds"]
    return [(f"train step, {measured['decoder']}, ms", named)]
