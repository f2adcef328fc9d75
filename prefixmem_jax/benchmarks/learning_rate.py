"""Chooses the quickstart's learning rates: the same grid, data, seed and steps for both systems.

    python -m prefixmem_jax.benchmarks.learning_rate --data DIR --out sweep

Trains the quickstart's baseline and PrefixMem at every rate and prints the validation loss
(cross-entropy per token of the next item of held-out users) at the last step. Stage 1 is
trained once and serves every rate.
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

from prefixmem_jax.data.prepare import prepare_data
from prefixmem_jax.files import write_json
from prefixmem_jax.quickstart import fit_sid_encoder, quickstart_configs
from prefixmem_jax.runs.metrics import read_metrics
from prefixmem_jax.training.loop import train


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", help="dataset folder (default: synthetic)")
    parser.add_argument("--out", type=Path, default=Path("learning_rate_sweep"))
    parser.add_argument("--rates", type=float, nargs="+", default=[1e-3, 3e-3, 1e-2])
    parser.add_argument("overrides", nargs="*", help="KEY=VALUE for every run")
    options = parser.parse_args()
    configs = quickstart_configs(options.out, options.data, options.overrides)
    data = prepare_data(configs["baseline"].data)
    configs = {n: fit_sid_encoder(c, data.catalog.space.levels) for n, c in configs.items()}
    train(configs["classification"], options.out / "classification", data)
    trials = []
    for rate in options.rates:
        for name in ("baseline", "prefixmem"):
            optimizer = dataclasses.replace(configs[name].optimizer, learning_rate=rate)
            config = dataclasses.replace(configs[name], optimizer=optimizer)
            run = options.out / f"{name}-{rate:g}"
            train(config, run, data)
            records = [r for r in read_metrics(run) if "validation/loss" in r]
            trials.append({"system": name, "learning_rate": rate, **records[-1]})
            best = min(records, key=lambda r: r["validation/loss"])
            levels = data.catalog.space.levels
            print(
                f"{name:10s} rate {rate:<8g} validation loss {records[-1]['validation/loss']:.4f} "
                f"(best {best['validation/loss']:.4f} at step {best['step']}), level-{levels} "
                f"accuracy {records[-1][f'validation/accuracy/level_{levels}']:.4f}",
                flush=True,
            )
            write_json(options.out / "learning_rate.json", trials)


if __name__ == "__main__":
    main()
