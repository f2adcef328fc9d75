"""What the SID encoder costs in a whole train step."""

from __future__ import annotations

from typing import Any

import jax

from prefixmem_jax.benchmarks.fixtures import one_device_model, random_batches, training
from prefixmem_jax.benchmarks.timing import machine, median_seconds
from prefixmem_jax.sid_encoders.prefix_memory import PrefixMemoryConfig

# Batch, length and codes per level by decoder: what fits the machines they are meant for.
SHAPES = {"quickstart": (40, 128, 256), "qwen3-0.6b": (8, 1024, 2048)}


def bench_step(decoder: str, rows: int, d_mem: int, repeats: int) -> dict[str, Any]:
    """Times a train step of a decoder without and with the SID encoder, on one device.

    Returns:
      machine, decoder, rows (per table), d_mem, tokens (per step).
      step_seconds: by `without` and `with` the SID encoder.
      sid_encoder_overhead: seconds that the SID encoder adds, as a share of the step without it.
      tokens_per_second: of both.
    """
    batch, length, codes = SHAPES[decoder]
    memory = PrefixMemoryConfig(target_levels=(4, 5), orders=4, heads=4, rows=rows, d_mem=d_mem)
    models = {
        name: one_device_model(decoder, sid_encoder, batch, length, codes)
        for name, sid_encoder in (("without", None), ("with", memory))
    }
    batches = random_batches(models["with"], 8)
    with jax.set_mesh(models["with"].mesh):
        calls = {name: training(spec, batches) for name, spec in models.items()}
        seconds = median_seconds(calls, repeats, "train step")
    tokens = batch * length
    return {
        "machine": machine(),
        "decoder": decoder,
        "rows": rows,
        "d_mem": d_mem,
        "tokens": tokens,
        "step_seconds": seconds,
        "sid_encoder_overhead": seconds["with"] / seconds["without"] - 1,
        "tokens_per_second": {name: tokens / value for name, value in seconds.items()},
    }


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
                for name in seconds
            ),
            f"  the SID encoder ({measured['rows']:,} rows per table, "
            f"d_mem {measured['d_mem']}) adds "
            f"{100 * measured['sid_encoder_overhead']:.1f}%",
        ]
    )


def panels(measured: dict[str, Any]) -> list[tuple[str, dict[str, float]]]:
    """What the plot shows."""
    named = {f"{name} SID encoder": value for name, value in measured["step_seconds"].items()}
    return [(f"train step, {measured['decoder']}", named)]
