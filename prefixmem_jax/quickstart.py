"""The main job: the same decoder with and without PrefixMem, trained, evaluated and compared."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from prefixmem_jax.config import Config
from prefixmem_jax.config_files import load_config, override, packaged_configs, to_json
from prefixmem_jax.convert import export_run
from prefixmem_jax.data.prepare import PreparedData, prepare_data
from prefixmem_jax.errors import UserError
from prefixmem_jax.evaluation.comparison import evaluate_heuristics
from prefixmem_jax.evaluation.evaluator import chosen_examples, evaluate_run, load_scores
from prefixmem_jax.evaluation.report import Results, comparison_table, text_table, write_report
from prefixmem_jax.evaluation.statistics import compare
from prefixmem_jax.files import write_json
from prefixmem_jax.inference.engine import Engine
from prefixmem_jax.runs.metrics import read_metrics
from prefixmem_jax.runs.run import Run
from prefixmem_jax.text import visible
from prefixmem_jax.training.loop import train

STAGE_ONE = "classification"
# The comparison's runs, in order: the paper's two stages on data whose optimum is known, and the
# recommender's recipe on somebody's data, where it has to recommend well.
SYNTHETIC = {
    "baseline": "quickstart/baseline.py",
    STAGE_ONE: "quickstart/classification.py",
    "prefixmem": "quickstart/prefixmem.py",
}
ON_DATA = {"baseline": "recommend/baseline.py", "prefixmem": "recommend/small.py"}


def quickstart_configs(
    out: Path, data: str | None, overrides: Sequence[str] = ()
) -> dict[str, Config]:
    """The runs of the comparison, with one set of overrides applied to all."""
    configs = {}
    for name, file in (SYNTHETIC if data is None else ON_DATA).items():
        config = load_config(packaged_configs() / file)
        if config.init.run is not None:
            stage_one = str(out.absolute() / STAGE_ONE)
            config = dataclasses.replace(
                config, init=dataclasses.replace(config.init, run=stage_one)
            )
        if data is not None:
            config = override(config, f"data.path={data}")
        configs[name] = _overridden(config, overrides)
    return configs


def _overridden(config: Config, overrides: Sequence[str]) -> Config:
    for text in overrides:
        if text.startswith("sid_encoder.") and config.sid_encoder is None:
            continue  # the baseline has none
        config = override(config, text)
    return config


def fit_sid_encoder(config: Config, levels: int, overrides: Sequence[str] = ()) -> Config:
    """Targets every level from the third on, whatever the depth of the data's SIDs; and the next
    item's first, by whole SIDs, if the config does. What `overrides` say of it stands.
    """
    if config.sid_encoder is None:
        return config
    if levels < 3:
        raise UserError(
            f"the data's SIDs have {levels} levels; quickstart compares from level 3 on, where "
            "prefixes are too many to memorise (train a config with sid_encoder.target_levels=(2,))"
        )
    next_item = (1,) if config.sid_encoder.reads_items else ()
    sid_encoder = dataclasses.replace(
        config.sid_encoder,
        target_levels=(*next_item, *range(3, levels + 1)),
        orders=levels if next_item else levels - 1,
    )
    fitted = dataclasses.replace(config, sid_encoder=sid_encoder)
    return _overridden(fitted, [text for text in overrides if text.startswith("sid_encoder.")])


def quickstart(
    out: Path, data: str | None, overrides: Sequence[str] = (), say: Any = lambda text: None
) -> Results:
    """Trains without and with PrefixMem, evaluates both beside the heuristics, and reports.

    Runs that `out` holds already go on from their checkpoints.

    Args:
      out: gets a folder for each run, results.json, report.html, PNGs, and `export/`, PrefixMem's
        run as a Hugging Face folder.
      data: dataset folder, None for the synthetic dataset.
      overrides: dotted overrides for all runs.
      say: called with each line of progress.

    Returns:
      What results.json holds: per system, flat metric names.
    """
    configs = quickstart_configs(out, data, overrides)
    prepared = prepare_data(configs["baseline"].data)
    levels = prepared.catalog.space.levels
    configs = {name: fit_sid_encoder(one, levels, overrides) for name, one in configs.items()}
    out.mkdir(parents=True, exist_ok=True)
    say(describe_data(prepared))
    transitions = None
    for name, config in configs.items():
        train(config, out / name, prepared, transitions=transitions)
        transitions = transitions or Run(out / name).transitions

    everyone, sample = chosen_examples(configs["baseline"].evaluation, prepared)
    facts = (
        f"{describe_data(prepared)}\n"
        f"Teacher-forced accuracy on {len(everyone):,} test users, retrieval on "
        f"{len(sample):,} of them over all {len(prepared.catalog):,} items, "
        f"beam {configs['baseline'].evaluation.beam}, seen items "
        f"{'left out' if configs['baseline'].evaluation.exclude_seen else 'kept'}.\n"
        "A SID that several items share counts as its items in random order (expected value)."
    )
    say(facts.partition("\n")[2])
    results: Results = {}
    for name in ("baseline", "prefixmem"):
        run = Run(out / name)
        engine = run.engine(prepared.catalog)
        results[name] = evaluate_run(run, prepared, engine=engine)
        results[name] |= costs(out, name, engine, configs)
    options = configs["baseline"].evaluation
    for name, evaluated in evaluate_heuristics(prepared, options, transitions=transitions).items():
        results[name] = evaluated.metrics
    for values in results.values():
        values["dataset_sha256"] = prepared.dataset.sha256
    base, ours = (load_scores(out / name) for name in ("baseline", "prefixmem"))
    paired = {"prefixmem": compare(base, ours)}
    differences = (
        "prefixmem minus baseline, paired bootstrap over users, 95% interval:\n"
        + comparison_table(paired, levels)
    )
    write_json(out / "results.json", results)
    write_json(out / "comparison.json", {"compared_with": "baseline", "systems": paired})
    write_report(out, results, learning_curves(out), facts, differences)
    say(text_table(results, levels))
    say(f"\n{differences}")
    export_run(Run(out / "prefixmem"), out / "export")
    return results


def describe_data(data: PreparedData) -> str:
    space, split = data.catalog.space, data.split
    return (
        f"{visible(data.dataset.name)}: {len(data.catalog):,} items, "
        f"{len(data.catalog.group_sids):,} distinct SIDs of {space.levels} levels "
        f"{space.codebook_sizes}; {len(data.dataset.histories):,} users, "
        f"{len(split.test):,} test users."
    )


def costs(out: Path, name: str, engine: Engine, configs: dict[str, Config]) -> dict[str, Any]:
    """What a system took to train, and what it was; stage 1 is counted where it was used."""
    config = configs[name]
    last = read_metrics(out / name)[-1]
    trained = jax.tree.leaves((engine.params, engine.memory))
    cost: dict[str, Any] = {
        "steps": config.steps,
        "tokens": last["tokens"],
        "flops": last["flops"],
        "seconds": last["seconds"],
        "parameters": sum(leaf.size for leaf in trained),
        "seed": config.seed,
    }
    if config.init.run is not None:
        stage_one = read_metrics(out / STAGE_ONE)[-1]
        cost["stage1_steps"] = configs[STAGE_ONE].steps
        for key in ("tokens", "flops", "seconds"):
            cost[f"stage1_{key}"] = stage_one[key]
            cost[key] += stage_one[key]
    resolved = json.loads(to_json(config))
    if config.init.run is not None:  # the same wherever the comparison was written
        resolved["init"]["run"] = Path(config.init.run).name
    cost["config"] = resolved
    return cost


def learning_curves(out: Path) -> dict[str, list[dict[str, float]]]:
    """Validation records per system; PrefixMem's time and FLOPs start where stage 1 ended."""
    curves = {}
    for name in ("baseline", "prefixmem"):
        curves[name] = [dict(r) for r in read_metrics(out / name) if "validation/loss" in r]
    if (out / STAGE_ONE).exists():
        stage_one = read_metrics(out / STAGE_ONE)[-1]
        for record in curves["prefixmem"]:
            for key in ("seconds", "flops"):
                record[key] += stage_one[key]
    return curves
