"""The verbs: each opens what it is told to, calls one function, and prints.

Imports stand inside, so that `--help` and mistakes in arguments cost no time, and JAX is set up
before anything of it runs.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from prefixmem_jax.errors import UserError
from prefixmem_jax.storage import to_path
from prefixmem_jax.text import visible


def start(distributed: bool = False) -> None:
    """Joins the other processes, if there are some, and sees that there are devices.

    What was compiled before is not compiled again.
    """
    from prefixmem_jax.parallel.compilation import keep_compiled_programs
    from prefixmem_jax.parallel.host_memory import keep_freed_memory
    from prefixmem_jax.parallel.mesh import all_devices, initialize_processes

    keep_freed_memory()
    keep_compiled_programs()
    if distributed:
        initialize_processes()
    all_devices()


def quickstart(options: argparse.Namespace) -> None:
    start()
    from prefixmem_jax.quickstart import quickstart

    quickstart(options.out, options.data, options.overrides, say=print)
    names = ("report.html", "results.json", "export")
    print("\n" + "  ".join(visible(str(options.out / name)) for name in names))


def sids(options: argparse.Namespace) -> None:
    start()
    from prefixmem_jax.semantic_ids.report import describe
    from prefixmem_jax.sids import make_sids

    measured = make_sids(
        options.data, options.out, options.embeddings, options.overrides, print, options.apply
    )
    print(f"\n{describe(measured)}\n")
    print(visible(f"{options.out / 'sids.html'}  {options.out / 'items.parquet'}"))


def start_(options: argparse.Namespace) -> None:
    start()
    from prefixmem_jax.start import start as start_job

    paths, overrides = _paths_and_overrides(options.given)
    out = options.out
    start_job(paths, out, options.embeddings, overrides, say=print)
    run, names = out / "prefixmem", ("report.html", "data/sids.html", "results.json", "export")
    there = (out / name for name in names if (out / name).exists())  # SIDs may not be ours
    print("\n" + "  ".join(visible(str(path)) for path in there))
    print(visible(f"prefixmem recommend {run} --history ID,ID,..."))


def _paths_and_overrides(given: Sequence[str]) -> tuple[list[Path], list[str]]:
    """What names files, and what says KEY=VALUE."""
    overrides = [text for text in given if "=" in text and not Path(text).exists()]
    return [Path(text) for text in given if text not in overrides], overrides


def convert(options: argparse.Namespace) -> None:
    from prefixmem_jax.config_files import override
    from prefixmem_jax.data.conversion import ConversionConfig
    from prefixmem_jax.data.conversion import convert as convert_data

    paths, overrides = _paths_and_overrides(options.given)
    config = ConversionConfig()
    for text in overrides:
        config = override(config, text)
    print(convert_data(config, paths, options.out).describe())
    print(visible(str(options.out)))


def generate(options: argparse.Namespace) -> None:
    from prefixmem_jax.config_files import override
    from prefixmem_jax.data.generation import generate as generate_data
    from prefixmem_jax.data.generator import GeneratorConfig

    config = GeneratorConfig()
    for text in options.overrides:
        config = override(config, text)
    about = generate_data(config, options.out)
    print(f"{about['items']:,} items, {config.users:,} users, {about['interactions']:,} items met")
    print("best possible accuracy of the next item's codes, true prefix given:")
    for level, (best, alone) in enumerate(
        zip(about["optimum"], about["prefix_optimum"], strict=True), start=1
    ):
        counting = "" if alone is None else f"; of the prefix alone {alone:.3f}"
        print(f"  level {level}: {best:.3f}{counting}")
    print(visible(str(options.out)))


def tokenizer(options: argparse.Namespace) -> None:
    from prefixmem_jax.data.formats.parquet import read_titles
    from prefixmem_jax.data.texts import TOKENIZER, train_tokenizer, write_tokenizer
    from prefixmem_jax.files import replacing_files

    titles = [title for title in read_titles(options.data)[0] if title]
    if not titles:
        raise UserError(f"{options.data}: no item has a title")
    trained = train_tokenizer(titles, options.tokens)
    with replacing_files(options.out, "tokenizer", last=TOKENIZER) as staged:
        write_tokenizer(trained, staged)
    size = trained.get_vocab_size()
    print(f"{size} tokens from {len(titles)} titles: data.text_tokens={size}")
    print(visible(f"data.tokenizer={options.out}"))


def pack(options: argparse.Namespace) -> None:
    from prefixmem_jax.config_files import load_config
    from prefixmem_jax.training_rows import pack as pack_rows

    config = load_config(options.config, options.overrides)
    rows = pack_rows(config, options.out, options.shards, options.workers)
    print(f"{rows:,} rows in {options.shards} files: data.packed={visible(str(options.out))}")


def report_sids(options: argparse.Namespace) -> None:
    start()
    from prefixmem_jax.semantic_ids.report import PAGE, describe
    from prefixmem_jax.sids import report_sids as report

    print(describe(report(options.data, options.embeddings, options.overrides, options.out)))
    if options.out is not None:
        print("\n" + visible(str(options.out / PAGE)))


def inspect(options: argparse.Namespace) -> None:
    from prefixmem_jax.config_files import load_config

    config = load_config(options.config, options.overrides)
    start()
    from prefixmem_jax.inspection import inspect as inspect_data

    inspect_data(config, options.documents, print, options.batch)


def train(options: argparse.Namespace) -> None:
    from prefixmem_jax.config_files import load_config

    config = load_config(options.config, options.overrides)
    start(options.distributed)
    from prefixmem_jax.training.loop import train

    run = to_path(options.out or f"runs/{config.name}")
    steps = int(train(config, run, profile=options.profile).step)
    print(visible(f"trained {config.name} for {steps} steps: {run}"))


def resume(options: argparse.Namespace) -> None:
    from prefixmem_jax.config_files import override
    from prefixmem_jax.runs.run import Run

    config = Run(options.run).config
    for text in options.overrides:
        config = override(config, text)
    start(options.distributed)
    from prefixmem_jax.training.loop import train

    steps = int(train(config, options.run).step)
    print(visible(f"trained {config.name} for {steps} steps: {options.run}"))


def runs(options: argparse.Namespace) -> None:
    from prefixmem_jax.files import write_json
    from prefixmem_jax.runs.listing import as_json, describe, list_runs

    listed = list_runs(options.folders)
    if options.json is not None:
        write_json(options.json, as_json(listed))
    print(describe(listed) if listed else "no runs there")


def sweep(options: argparse.Namespace) -> None:
    from prefixmem_jax.sweep import combinations

    runs = combinations(options.config, options.overrides)  # mistakes are found before JAX starts
    out = options.out or Path(f"sweeps/{runs[0][2].name}")
    start()
    from prefixmem_jax.sweep import describe, sweep

    results = sweep(options.config, options.overrides, out, say=print)
    print("\n" + visible(describe(results)))
    print(visible(str(out / "sweep.json")))


def paper(options: argparse.Namespace) -> None:
    if options.result is not None:
        _show_paper(options)
        return
    from prefixmem_jax.cli import terminal
    from prefixmem_jax.paper.experiment import Experiment
    from prefixmem_jax.paper.plots import plot
    from prefixmem_jax.paper.regime import describe_regime
    from prefixmem_jax.paper.report import describe
    from prefixmem_jax.paper.tables import OF_THE_PAPER
    from prefixmem_jax.paper.workers import Workers, usual_count
    from prefixmem_jax.paper.written import write_configs

    tables = OF_THE_PAPER if options.table == "all" else (options.table,)
    if options.configs:
        if options.table == "regime":
            raise UserError("paper: --configs is for a table; regime trains nothing")
        print("\n".join(write_configs(options.scale, tables, options.out, options.overrides)))
        return
    if options.scale == "paper" and options.table != "regime":
        raise UserError("paper: --scale paper is for pods; --configs writes what they train")
    # The processes that train have the devices; this one has none.
    jobs = usual_count() if options.jobs is None else options.jobs
    with Workers(jobs, terminal.prepare) as workers:
        experiment = Experiment(
            options.scale, options.out, options.seeds, workers, options.overrides, say=print
        )
        if options.table == "regime":
            print("\n".join(describe_regime(experiment.regime())))
            return
        for table, result in experiment.results(tables):
            path = experiment.folder / f"{table}.png"
            plot(path, result)
            print(f"\n{describe(result)}")
            print(visible(str(path.with_suffix(".json"))), visible(str(path)))


def _show_paper(options: argparse.Namespace) -> None:
    if options.overrides:
        raise UserError(f"paper: --from trains nothing, so {options.overrides[0]} means nothing")
    from prefixmem_jax.paper.plots import plot
    from prefixmem_jax.paper.report import describe, read_result
    from prefixmem_jax.storage import make_folder

    result = read_result(options.result, options.table)
    print(describe(result))
    make_folder(options.out)
    path = options.out / f"{options.table}.png"
    plot(path, result)
    print(visible(str(path)))


def evaluate(options: argparse.Namespace) -> None:
    start(options.distributed)
    import jax

    from prefixmem_jax.evaluation.comparison import evaluate_runs
    from prefixmem_jax.evaluation.report import comparison_table, text_table

    results, paired, levels = evaluate_runs(
        options.runs,
        options.data,
        options.split,
        options.users,
        options.beam,
        options.include_seen,
        options.item_share,
        options.transition_share,
        options.heuristics,
        options.blend,
        options.out,
        options.step,
    )
    if jax.process_index():
        return
    first = next(iter(results.values()))
    users = first[f"{options.split}_users"]
    print(
        f"retrieval on {first['retrieval_users']:,} of {users:,} {options.split} users, "
        f"beam {first['beam']}, seen items {'left out' if first['exclude_seen'] else 'kept'}; "
        f"teacher-forced accuracy on all; {first['collisions']}"
    )
    print(text_table(results, levels))
    if paired:
        print(
            f"\nagainst {visible(next(iter(results)))}, paired bootstrap over users, 95% interval:"
        )
        print(comparison_table(paired, levels))
    print("  ".join(visible(str(run / "metrics.json")) for run in options.runs))


def recommend(options: argparse.Namespace) -> None:
    if (options.histories is None) != (options.out is None):
        raise UserError("recommend: --histories and --out go together")
    start(options.distributed)
    if options.histories is not None:
        _recommend_to_all(options)
        return
    from prefixmem_jax.recommender import recommend
    from prefixmem_jax.runs.run import Run

    run = Run(options.run, step=options.step)
    engine = run.engine(run.catalog(options.data))

    def answer(history: str) -> None:
        best = recommend(engine, history, options.top, not options.include_seen, options.beam)
        print("rank  log-prob  item")
        for rank, one in enumerate(best, start=1):
            sid = "-".join(map(str, one.sid))
            title = visible(one.title or "")
            print(
                f"{rank:3d}  {one.score:8.3f}  item {visible(one.key):<8s} {sid:<20s} {title}",
                flush=True,
            )

    if options.history is not None:
        answer(options.history)
        return
    print("a history a line, item ids separated by commas:", file=sys.stderr)
    for line in filter(str.strip, sys.stdin):
        try:
            answer(line)
        except UserError as error:
            print(f"prefixmem: {visible(str(error))}", file=sys.stderr)


def _recommend_to_all(options: argparse.Namespace) -> None:
    import jax

    from prefixmem_jax.data.history_files import HistoryFile
    from prefixmem_jax.recommender import recommend_to_all
    from prefixmem_jax.runs.run import Run

    run = Run(options.run, step=options.step)
    with HistoryFile(options.histories) as histories:
        unknown = recommend_to_all(
            run.engine(run.catalog(options.data)),
            run.identity(),
            histories,
            options.out,
            options.top,
            not options.include_seen,
            options.beam,
        )
        if jax.process_index():
            return
        if unknown:
            print(f"{unknown:,} items of the histories are not in the catalogue: left out")
        print(visible(f"{histories.users:,} users: {options.out}"))


def export(options: argparse.Namespace) -> None:
    start(options.distributed)
    import jax

    from prefixmem_jax.convert import export_run
    from prefixmem_jax.runs.run import Run

    run = Run(options.run, step=options.step)
    export_run(
        run,
        options.out,
        options.dtype,
        options.max_shard_size,
        options.tokenizer,
        run.catalog(options.data),
    )
    if jax.process_index() == 0:
        print(visible(f"exported {options.run}: {options.out}"))


def import_(options: argparse.Namespace) -> None:
    start()
    from prefixmem_jax.convert import import_folder

    import_folder(options.folder, options.out)
    print(visible(f"imported {options.folder}: {options.out}"))


def plan(options: argparse.Namespace) -> None:
    from prefixmem_jax.config_files import load_config
    from prefixmem_jax.files import write_json
    from prefixmem_jax.planning.topology import use_cpu

    if options.devices and options.slices > 1:
        raise UserError("plan: --slices goes with --topology; CPU devices have none")
    config = load_config(options.config, options.overrides)
    use_cpu(options.devices or 1)
    from prefixmem_jax.planning.plan import describe, plan

    where = options.topology, options.devices, options.slices
    planned = plan(config, *where, options.planned, say=partial(print, file=sys.stderr))
    print(describe(planned))
    if options.json:
        write_json(options.json, planned.to_json())
