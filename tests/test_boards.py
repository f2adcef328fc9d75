"""Weights & Biases, offline: what its own files hold of a run that was gone on with."""

import dataclasses
import json
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import prefixmem, python_process
from models import small_config

from prefixmem_jax.config_groups import DecoderConfig
from prefixmem_jax.data.prepare import prepare_data
from prefixmem_jax.errors import UserError
from prefixmem_jax.runs import boards
from prefixmem_jax.runs.metrics import read_metrics
from prefixmem_jax.training.loop import train

BLOCK, HEADER = 32768, 7


def records_in(path: Path) -> Iterator:
    """The records of a .wandb file: LevelDB's log format, after seven bytes of its own."""
    from wandb.proto.wandb_internal_pb2 import Record

    content, at, pieces = path.read_bytes(), HEADER, b""
    assert content.startswith(b":W&B")
    while at < len(content):
        if BLOCK - at % BLOCK < HEADER:  # no room for a record
            at += BLOCK - at % BLOCK
            continue
        size, kind = struct.unpack_from("<xxxxHB", content, at)
        pieces += content[at + HEADER : at + HEADER + size]
        at += HEADER + size
        if kind in (1, 4):  # whole, or the last piece
            record = Record()
            record.ParseFromString(pieces)
            yield record
            pieces = b""


def shown(run: Path) -> list[tuple[str, dict[int, dict], int]]:
    """Of each time that it was started: its number, records by step, and how it ended."""
    found = []
    for path in sorted(run.glob("wandb/offline-run-*/run-*.wandb")):
        number, status, by_step = "", -1, {}
        for record in records_in(path):
            if record.HasField("run"):
                number = record.run.run_id
                assert record.run.project == "shop" and record.run.display_name == run.name
            elif record.HasField("history"):
                items = {
                    i.key or i.nested_key[0]: json.loads(i.value_json) for i in record.history.item
                }
                by_step[items.pop("_step")] = items
            elif record.HasField("exit"):
                status = record.exit.exit_code
        found.append((number, by_step, status))
    return found


@pytest.fixture(scope="module")
def config():
    small = small_config(DecoderConfig(layers=1), 0, steps=6, log_every_steps=2, wandb="shop")
    return dataclasses.replace(small, data=dataclasses.replace(small.data, batch_size=8))


@pytest.fixture(scope="module")
def data(config):
    return prepare_data(config.data)


@pytest.mark.usefixtures("first_device_alone")
def test_the_same_records_under_the_same_number(config, data, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    run = tmp_path / "run"
    for steps in (4, 6):
        train(dataclasses.replace(config, steps=steps), run, data)
    (number, first, status), (again, second, other) = shown(run)
    assert number == again == json.loads((run / "wandb.json").read_text())["shop"]
    assert status == other == 0
    assert (set(first), set(second)) == ({2, 4}, {6})
    recorded = {}
    for record in read_metrics(run):  # two of a step that is validated
        recorded.setdefault(record.pop("step"), {}).update(record)
    for step, there in {**first, **second}.items():
        assert {name: there[name] for name in recorded[step]} == pytest.approx(recorded[step])


@pytest.mark.usefixtures("first_device_alone")
def test_a_training_that_fails_is_shown_as_failed(config, data, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    model = dataclasses.replace(config.model, init_std=1e30)
    with pytest.raises(UserError, match="not finite"):
        train(dataclasses.replace(config, model=model), tmp_path / "run", data)
    ((_, _, status),) = shown(tmp_path / "run")
    assert status == 1


def test_who_is_not_logged_in_is_told(tmp_path, monkeypatch):
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    small = ["data.synthetic.items=300", "data.synthetic.users=300", "data.sequence_length=64"]
    done = prefixmem(
        "train", "quickstart/baseline", *small, "wandb=shop", "--out", tmp_path / "run", expect=2
    )
    assert (
        done.stderr
        == "prefixmem: wandb=shop: No API key configured. Use `wandb login` to log in.\n"
    )


def test_where_it_is_not_installed_nothing_is_begun(config, data, tmp_path, monkeypatch):
    monkeypatch.setattr(boards, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"wandb=shop: needs wandb: pip install '\.\[wandb\]'"):
        train(config, tmp_path / "run", data)
    assert not (tmp_path / "run").exists()


def test_where_a_run_is_shown_is_said(tmp_path):
    """Of a run that is not offline; what it would answer is made up, as there is no network."""
    script = """
import sys, types, wandb
from pathlib import Path
from prefixmem_jax.cli import terminal
terminal.prepare()
from prefixmem_jax.config import Config
from prefixmem_jax.runs.boards import WeightsAndBiases
answer = types.SimpleNamespace(offline=False, disabled=False, url="https://wandb.example/shop/1")
wandb.init = lambda **settings: answer
folder = Path(sys.argv[1])
WeightsAndBiases(folder, folder, Config("board", wandb="shop"))
"""
    _, said = python_process(script, str(tmp_path)).communicate(timeout=60)
    assert said == "prefixmem: Weights & Biases: https://wandb.example/shop/1\n"
