"""Runs, data and exports in object stores, as emulators on this machine have them."""

import contextlib
import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import chex
import forked
import jax
import pytest
from conftest import command_environment, prefixmem
from ended_runs import records_of, state_of
from jax.experimental.compilation_cache.compilation_cache import reset_cache
from object_store import BUCKET, object_store

from prefixmem_jax.data.formats.parquet import read_dataset
from prefixmem_jax.errors import UserError
from prefixmem_jax.files import replacing, replacing_files, sha256_of
from prefixmem_jax.runs.checkpoint import Checkpoints, saved_steps
from prefixmem_jax.runs.listing import list_runs
from prefixmem_jax.runs.run import Run
from prefixmem_jax.storage import files_below, to_path

TRAIN = [
    "train", "quickstart/baseline", "steps=60", "checkpoint.every_steps=10", "log_every_steps=5",
    "data.batch_size=8", "data.sequence_length=64", "model.layers=1", "model.d_model=32",
    "evaluation.every_steps=20", "evaluation.validation_examples=40",
    "evaluation.select_by=item_ndcg@10", "evaluation.transition_share=0.1",
]  # fmt: skip


@pytest.fixture(scope="session")
def stores() -> Iterator[Callable[[str], dict[str, str]]]:
    """An emulator for each scheme, until the tests end: clients in this process keep its address."""
    with contextlib.ExitStack() as stack:
        yield cache(lambda scheme: stack.enter_context(object_store(scheme)))


@pytest.fixture(params=["gs", "s3"])
def store(request, stores, monkeypatch) -> str:
    for name, value in stores(request.param).items():
        monkeypatch.setenv(name, value)
    return f"{request.param}://{BUCKET}"


@pytest.fixture(scope="session")
def made(tmp_path_factory) -> Callable:
    """What was made in a store once: workers go from one store to another and back."""
    return cache(lambda make, given: make(given, tmp_path_factory.mktemp("made")))


@pytest.fixture
def datasets(store, made, here) -> tuple[str, Path]:
    """The same data, there and here."""
    return made(_datasets, store), here / "data"


@pytest.fixture
def runs(datasets, made, here) -> tuple[str, Path]:
    """The same training, there and here."""
    return made(_runs, datasets[0]), here / "one"


def _data(out: Path | str) -> None:
    prefixmem(
        "data", "generate", "--out", out, "users=200", "codebook_sizes=(16,16,16)",
        "children=(8,4,4)", "groups=4", "titles=True",
    )  # fmt: skip


@pytest.fixture(scope="session")
def here(tmp_path_factory) -> Path:
    """What other folders are compared with: `data`, and `one`, trained on it uninterrupted."""
    folder = tmp_path_factory.mktemp("here")
    _data(folder / "data")
    prefixmem(*TRAIN, f"data.path={folder / 'data'}", "--out", folder / "one")
    return folder


def _datasets(store: str, folder: Path) -> str:
    _data(f"{store}/data")
    return f"{store}/data"


def _runs(there_data: str, folder: Path) -> str:
    """The same training there, killed after its first checkpoint."""
    there = there_data.replace("/data", "/runs/one")
    arguments = [*TRAIN, f"data.path={there_data}", "--out", there]
    process = forked.start(
        forked.command, arguments, command_environment(), folder / "out", folder / "err"
    )
    until = time.monotonic() + 200
    while not saved_steps(to_path(there)) and time.monotonic() < until:
        assert process.is_alive(), (folder / "err").read_text()
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert saved_steps(to_path(there))[0] < 60
    prefixmem("resume", there)
    return there


def test_data_are_read_as_if_they_were_here(datasets):
    there, here = map(read_dataset, datasets)
    assert (there.sha256, there.catalog.sha256) == (here.sha256, here.catalog.sha256)
    assert there.name == here.name == "data"
    names = [path.name for path in files_below(to_path(datasets[0]))]
    assert names == sorted(os.listdir(datasets[1]))


def test_a_killed_run_ends_as_one_that_was_never_killed(store, runs):
    there, here = map(to_path, runs)
    (step, state, data), (wanted_step, wanted, wanted_data) = map(state_of, runs)
    assert step == wanted_step == 60 and data == wanted_data
    chex.assert_trees_all_equal(state, wanted)
    assert records_of(there) == records_of(here)  # each step once, with the same numbers
    assert saved_steps(there) == saved_steps(here)  # the newest, and the best
    assert Run(there).step == Run(here).step
    events = [path.name for path in files_below(there / "tensorboard")]
    assert len(events) == 2 and all("tfevents" in name for name in events)
    (listed,) = list_runs([to_path(f"{store}/runs")])
    assert (listed.path, listed.state, listed.step) == (str(there), "done", 60)


def test_what_is_made_of_a_run_is_the_same(store, runs, tmp_path):
    there, here = runs
    prefixmem("evaluate", there, here, "--out", f"{store}/compared", "--users", "100")
    compared = to_path(f"{store}/compared")
    for name, results in json.loads((compared / "comparison.json").read_text())["systems"].items():
        for metric, found in results.items():
            assert found["difference"] == 0, (name, metric)
    assert (compared / "recall.png").read_bytes().startswith(b"\x89PNG")
    for run, out in (
        (there, f"{store}/exported"),
        (there, f"{store}/exported"),  # replaces the first
        (here, tmp_path / "exported"),
    ):
        prefixmem("export", run, "--out", out)
    exported, files = to_path(f"{store}/exported"), files_below(tmp_path / "exported")
    assert [path.name for path in files_below(exported)] == [path.name for path in files]
    for path in files:
        if path.name not in ("README.md", "prefixmem_files.json"):  # the run's name is in there
            assert sha256_of(exported / path.name) == sha256_of(path), path.name
    answers = [
        prefixmem("recommend", run, "--history", "1,2,3", "--top", "3").stdout
        for run in (there, here)
    ]
    assert answers[0] == answers[1] and len(answers[0].splitlines()) == 4


def test_stage_two_takes_what_stage_one_left_there(store, runs, tmp_path):
    there, here = runs
    taken = ["init.take=['llm']", "steps=1", "checkpoint.every_steps=1"]
    for run, out in ((there, f"{store}/two"), (here, tmp_path / "two")):
        prefixmem(*TRAIN, f"data.path={Run(run).config.data.path}", f"init.run={run}", *taken,
                  "--out", out)  # fmt: skip
    chex.assert_trees_all_equal(state_of(f"{store}/two")[1], state_of(tmp_path / "two")[1])


def test_a_checkpoint_that_was_not_finished_does_not_count(store, datasets):
    there = to_path(f"{store}/unfinished")
    options = [*TRAIN, f"data.path={datasets[0]}", "--out", there, "evaluation.select_by=None"]
    prefixmem(*options, "steps=20")
    before = state_of(there)
    last = {"gs": "commit_success.txt", "s3": "_CHECKPOINT_METADATA"}[store.partition(":")[0]]
    (there / "checkpoints" / "20" / last).unlink()
    assert saved_steps(there) == [10]
    prefixmem(*options, "steps=20")
    after = state_of(there)
    assert after[0] == 20
    chex.assert_trees_all_equal(after[1], before[1])


def test_compiled_programs_are_kept_there(store):
    """As the launchers of TPUs want it, whose machines go."""
    settings = {"jax_compilation_cache_dir": f"{store}/programs",
                "jax_persistent_cache_min_compile_time_secs": 0}  # fmt: skip
    before, events = {name: getattr(jax.config, name) for name in settings}, []
    listen = lambda event, **_: events.append(event.rpartition("/")[2])  # noqa: E731
    jax.monitoring.register_event_listener(listen)
    try:
        for name, value in settings.items():
            jax.config.update(name, value)
        for once, other in (("cache_misses", "cache_hits"), ("cache_hits", "cache_misses")):
            events.clear()
            reset_cache()
            assert (
                jax.jit(lambda x: x * 3 + 1)(2) == 7
            )  # each time a new function, the same program
            assert once in events and other not in events
    finally:
        jax.monitoring.unregister_event_listener(listen)
        for name, value in before.items():
            jax.config.update(name, value)
        reset_cache()
    names = [path.name for path in files_below(to_path(f"{store}/programs"))]
    assert names and all(name.endswith("-cache") for name in names)


def test_several_processes_do_not_save_where_orbax_does_not(store, monkeypatch):
    if store.startswith("gs://"):
        pytest.skip("Orbax writes there")
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(UserError, match=r"several processes cannot save there .* expected gs://"):
        Checkpoints(to_path(f"{store}/several"), keep=1)


def test_nothing_half_written_appears(store):
    folder = to_path(f"{store}/half")
    with pytest.raises(RuntimeError), replacing(folder / "one.txt") as beside:
        beside.write_text("half")
        raise RuntimeError
    with pytest.raises(RuntimeError), replacing_files(folder, "export", "last") as staged:
        (staged / "first").write_text("half")
        raise RuntimeError
    assert not folder.exists()
    (folder / "theirs").write_text("precious")
    with (
        pytest.raises(UserError, match="holds something else than an older export"),
        replacing_files(folder, "export", "last"),
    ):
        pass
    assert [path.name for path in files_below(folder)] == ["theirs"]


@pytest.mark.parametrize(
    "arguments, words",
    [
        ((*TRAIN, "--out", "{scheme}://nobody/run"), "{scheme}://nobody: no such bucket"),
        ((*TRAIN, "--out", "az://nobody/run"), "az://nobody/run: expected a folder, gs:// or s3://"),
        ((*TRAIN, "data.path={store}/none"), "{store}/none: not a folder with items.parquet"),
        ((*TRAIN, "init.run={store}/none", "init.take=['llm']"), "{store}/none: not a run directory"),
        ((*TRAIN, "--profile", "1:2", "--out", "{store}/x"), "expected one of this machine"),
        (("evaluate", "{store}/none"), "{store}/none: not a run directory"),
        (("quickstart", "--out", "{store}/x"), "{store}/x: expected a folder, not {scheme}://"),
        (("sids", "DATA", "--out", "{store}/x"), "{store}/x: expected a folder, not {scheme}://"),
    ],
)  # fmt: skip
def test_mistakes_are_one_line(store, arguments, words, tmp_path, monkeypatch, refused):
    monkeypatch.chdir(tmp_path)
    names = {"store": store, "scheme": store.partition(":")[0]}
    assert words.format(**names) in refused(*(one.format(**names) for one in arguments))
    assert not os.listdir() and not to_path(f"{store}/x").exists()
