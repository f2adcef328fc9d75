"""Trains and evaluates what a table needs: every system at the same rates, then at more seeds."""

from __future__ import annotations

import datetime
import json
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from prefixmem_jax.config import Config
from prefixmem_jax.config_files import from_keys
from prefixmem_jax.data.generation import ABOUT, generate
from prefixmem_jax.data.prepare import PreparedData, prepare_data
from prefixmem_jax.errors import Stopped, UserError
from prefixmem_jax.evaluation.evaluator import load_scores
from prefixmem_jax.evaluation.metrics import Scores
from prefixmem_jax.evaluation.statistics import compare, intervals, means
from prefixmem_jax.files import read_json_object, write_json
from prefixmem_jax.paper.regime import by_times_met, judge, measure_regime
from prefixmem_jax.paper.remaining import Remaining
from prefixmem_jax.paper.scales import SCALES
from prefixmem_jax.paper.tables import ROWS, TABLES, config_of, count_runs
from prefixmem_jax.paper.workers import Workers
from prefixmem_jax.runs.metrics import read_metrics
from prefixmem_jax.runs.run import Run, differences
from prefixmem_jax.training_rows import training_source

# What a table's file keeps of all that a run's metrics.json has.
KEPT = ("tf_accuracy/", "reachable", "sid_recall@", "sid_hit_rate", "unique_level_1")

Key = TypeVar("Key")
Result = TypeVar("Result")


class Experiment:
    """The runs of one scale, in one folder; what is done already is not done again."""

    def __init__(
        self,
        scale: str,
        out: Path,
        seeds: int,
        workers: Workers,
        overrides: Sequence[str] = (),
        say: Callable[[str], None] = lambda text: None,
    ):
        """Generates the data where `out` does not hold it.

        Args:
          workers: train and evaluate the runs.
          overrides: of the baseline's config, and so of every system's.
          say: called with each line of progress.
        """
        if seeds < 1:
            raise UserError(f"--seeds: expected 1 or more, got {seeds}")
        self.scale, self.folder, self.seeds, self.say = SCALES[scale], out / scale, seeds, say
        self.workers = workers
        # Rows share runs: by folder, the one who is at it.
        self.locks: dict[str, threading.Lock] = {}
        base = self.scale.baseline(overrides)
        data = self.folder / "data"
        if base.data.path is None:
            if not (data / ABOUT).exists():
                say(f"generating {data}")
                generate(self.scale.data, data)
            made_of = json.loads(json.dumps(vars(self.scale.data)))
            for key, was, now in differences(read_json_object(data / ABOUT).get("config"), made_of):
                raise UserError(
                    f"{data}: was generated with another config ({key} is {was} there, {now} "
                    "here); use --out"
                )
            base = replace(base, data=replace(base.data, path=str(data)))
        self.base: Config = base
        self.data: PreparedData = prepare_data(base.data)
        rows = len(training_source(base, self.data))
        self.turns = base.steps * base.data.batch_size / rows
        levels = self.data.catalog.space.levels
        if levels < 3:
            raise UserError(f"the data's SIDs have {levels} levels; a memory wants 3 or more")
        self.memory = self.scale.memory_of(levels)

    def results(self, tables: Sequence[str]) -> Iterator[tuple[str, dict[str, Any]]]:
        """Trains and evaluates the tables' rows; each is compared with its table's first.

        Yields:
          The table's name, and its `data` (`regime`, judged by the first row), and by row: title,
          the paper's numbers, chosen learning rate, what each rate gave on validation, costs,
          `curve` (steps, tokens and the deepest level's accuracy at each validation, of the seeds'
          mean), and by metric the mean over seeds, each seed's, and the difference from the first
          row with a paired 95% interval over users; `against_equal_cost` has that from the row of
          equal cost, if any.
        """
        rows = {row for name in tables for row in TABLES[name]}
        self._remaining = Remaining(count_runs(rows, len(self.scale.rates), self.seeds))
        for name in tables:
            yield name, self._table(name)

    def _table(self, name: str) -> dict[str, Any]:
        self.say(f"{name}: {', '.join(ROWS[row].title for row in TABLES[name])}")
        found = self._together({row: partial(self._row, row) for row in TABLES[name]})
        rows = {row: result for row, (result, _) in found.items()}
        scores = {row: by_user for row, (_, by_user) in found.items()}
        first = TABLES[name][0]
        for row in TABLES[name][1:]:
            rows[row]["against_first"] = compare(scores[first], scores[row])
            against = ROWS[row].equal_cost
            if against in TABLES[name]:
                differences = compare(scores[against], scores[row])
                rows[row]["against_equal_cost"] = {"row": against, "differences": differences}
        regime = self.regime()
        deepest = f"tf_accuracy/level_{len(regime['levels'])}"
        regime |= judge(regime, rows[first]["metrics"][deepest])
        by_met = by_times_met(self.data, self.turns, scores)
        result = {"table": name, "data": regime, "rows": rows, "by_met": by_met}
        here = {"cores": os.cpu_count(), "date": datetime.date.today().isoformat()}
        result["machine"] = {**self.workers.machine(), **here}
        write_json(self.folder / f"{name}.json", result)
        return result

    def regime(self) -> dict[str, Any]:
        """`measure_regime` of the data, with the best possible accuracy where that is known."""
        about = Path(self.base.data.path) / ABOUT
        optimum = read_json_object(about)["optimum"] if about.exists() else None
        return measure_regime(self.data, self.turns, optimum)

    def _together(self, calls: Mapping[Key, Callable[[], Result]]) -> dict[Key, Result]:
        """What each call returns: they wait for the same workers, and end together if one fails."""
        with ThreadPoolExecutor(len(calls)) as pool:
            found = {key: pool.submit(call) for key, call in calls.items()}
            try:
                done, _ = wait(found.values(), return_when=FIRST_EXCEPTION)
            except BaseException:  # Ctrl-C
                self.workers.stop()
                raise
            if any(one.exception() for one in done):
                self.workers.stop()
        errors = [error for one in found.values() if (error := one.exception())]
        # The others were stopped because of it.
        for error in sorted(errors, key=lambda error: isinstance(error, Stopped)):
            raise error
        return {key: one.result() for key, one in found.items()}

    def _row(self, row: str) -> tuple[dict[str, Any], Scores]:
        rate, tried = self._choose(row)
        by_seed = self._together(
            {seed: partial(self._scores, row, rate, seed) for seed in range(self.seeds)}
        ).values()
        names = {name for name in next(iter(by_seed)) if name.startswith(KEPT)}
        runs = [self._run(row, rate, seed) for seed in range(self.seeds)]
        mean = {n: np.mean([scores[n] for scores in by_seed], axis=0) for n in sorted(names)}
        costs = self._costs(row, rate)
        return {
            "title": ROWS[row].title,
            "paper": dict(ROWS[row].paper),
            "learning_rate": rate,
            "validation_loss": tried,
            "metrics": means(mean),
            "intervals": intervals(mean),
            "by_seed": [means({n: scores[n] for n in mean}) for scores in by_seed],
            "curve": _curve(runs, f"validation/accuracy/level_{self.data.catalog.space.levels}"),
            **costs,
        }, mean

    def _choose(self, row: str) -> tuple[float, dict[str, float]]:
        """The learning rate with the lowest last validation loss, of the first seed's runs."""
        rates, other = self.scale.rates, ROWS[row].rate_of
        if other is not None:
            rates = (self._choose(other)[0],)
        runs = self._together({rate: partial(self._train, row, rate, 0) for rate in rates})
        tried = {rate: _last(run, "validation/loss") for rate, run in runs.items()}
        best = min(tried, key=tried.get)
        return best, {f"{rate:g}": loss for rate, loss in tried.items()}

    def _run(self, row: str, rate: float, seed: int) -> Path:
        return self.folder / "runs" / row / f"learning_rate={rate:g},seed={seed}"

    def _train(self, row: str, rate: float, seed: int) -> Path:
        """A run's folder, once it is trained, after the runs whose memory it takes."""
        folder = self._run(row, rate, seed)
        before = {}
        for other in ROWS[row].after:
            before[other] = self._train(other, self._choose(other)[0], seed)
        config = config_of(row, self.scale, self.base, self.memory, rate, seed, before)
        with self.locks.setdefault(str(folder), threading.Lock()):
            if self._is_done(folder, config):
                self._remaining.found(folder)
            else:  # or it is another run, which training says
                what = f"  {row}, learning rate {rate:g}, seed {seed}"
                self.workers.train(
                    config, folder, lambda: self.say(f"{what}: {self._remaining.begin(folder)}")
                )
                self._remaining.end(folder)
        return folder

    def _is_done(self, folder: Path, config: Config) -> bool:
        run = Run(folder)
        return (
            run.has_checkpoint
            and run.step == config.steps
            and run.config == config
            and run.data_description.sha256 == self.data.dataset.sha256
        )

    def _scores(self, row: str, rate: float, seed: int) -> Scores:
        """By test user, of a run that is trained and evaluated where it has not been."""
        folder = self._train(row, rate, seed)
        if not _is_evaluated(Run(folder)):
            self.workers.evaluate(folder)
        return load_scores(folder)

    def _costs(self, row: str, rate: float) -> dict[str, float]:
        """Tokens, FLOPs and seconds of the first seed's run and of those it takes from."""
        runs = [self._run(row, rate, 0)]
        runs += [self._run(other, self._choose(other)[0], 0) for other in ROWS[row].after]
        return {key: sum(_last(run, key) for run in runs) for key in ("tokens", "flops", "seconds")}


def _is_evaluated(run: Run) -> bool:
    """Whether its last step was on the test users, with its own config: keys that came later count
    as what they are by default.
    """
    path = run.path / "metrics.json"
    found = read_json_object(path) if path.exists() else {}
    if (found.get("split"), found.get("step")) != ("test", run.step):
        return False
    try:
        return from_keys(found.get("config"), Config) == run.config
    except UserError:
        return False


def _last(run: Path, key: str) -> float:
    return [record[key] for record in read_metrics(run) if key in record][-1]


def _curve(runs: Sequence[Path], key: str) -> list[tuple[int, float, float]]:
    """Step, tokens and the runs' mean of what they recorded, where all of them did."""
    by_run = [{one["step"]: one for one in read_metrics(run) if key in one} for run in runs]
    steps = sorted(set(by_run[0]).intersection(*by_run[1:]))
    return [
        (step, by_run[0][step]["tokens"], float(np.mean([run[step][key] for run in by_run])))
        for step in steps
    ]
