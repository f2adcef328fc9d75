"""Faults of Hugging Face folders, injected for real: each is one line, and nothing is lost."""

import dataclasses
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import chex
import jax
import numpy as np
import pytest
import torch
from conftest import ROOT, mounted
from hf_folders import contents, edit_json, refused, save_model
from models import DECODER, make_run, small_config
from transformers import AutoModelForCausalLM

from prefixmem_jax.config_groups import EvaluationConfig, InitConfig
from prefixmem_jax.convert import export_run, import_folder
from prefixmem_jax.files import MANIFEST, replacing_files
from prefixmem_jax.hf.families import read_folder
from prefixmem_jax.recommender import recommend
from prefixmem_jax.training.initialise import parts_of_folder

ONE_LAYER = dataclasses.replace(DECODER, layers=1)
BEAM = 7


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    config = small_config(ONE_LAYER, 0, evaluation=EvaluationConfig(beam=BEAM))
    folder = tmp_path_factory.mktemp("faults") / "run"
    folder.mkdir()
    return make_run(folder, config)


@pytest.fixture(scope="module")
def exported_once(run):
    export_run(run, run.path.parent / "exported", max_shard_size="20KB")
    return run.path.parent / "exported"


@pytest.fixture(scope="module")
def model_once(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("model") / "qwen3")


@pytest.fixture
def exported(exported_once, tmp_path):
    return shutil.copytree(exported_once, tmp_path / "exported")


@pytest.fixture
def model(model_once, tmp_path):
    return shutil.copytree(model_once, tmp_path / "qwen3")


# What `export` and `import` replace.


def fine_tune(folder: Path) -> None:
    """As transformers saves a model that was trained further."""
    tuned = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    with torch.no_grad():
        next(tuned.parameters()).add_(1)
    tuned.save_pretrained(folder)


def change_a_weight(folder: Path) -> None:
    path = next(folder.glob("*.safetensors"))
    path.write_bytes(path.read_bytes()[:-1] + b"\x01")


def put_a_folder_for_a_file(folder: Path) -> None:
    (folder / "README.md").unlink()
    (folder / "README.md").mkdir()


CHANGES = {
    "fine-tuned": (fine_tune, "config.json: was changed since the export that wrote it"),
    "a weight": (change_a_weight, ".safetensors: was changed since the export that wrote it"),
    "the card": (lambda f: (f / "README.md").write_text("mine"), "README.md: was changed since"),
    "a folder for a file": (put_a_folder_for_a_file, "README.md: was changed since"),
    "no manifest": (lambda f: (f / MANIFEST).unlink(), "holds something else than an older export"),
    "a manifest of another folder": (
        lambda f: edit_json(f / MANIFEST, lambda m: m.update(kind="import")),
        "holds something else than an older export",
    ),
    "a manifest with a path outside": (
        lambda f: edit_json(f / MANIFEST, lambda m: m["files"].update({"../run/config.json": []})),
        f"{MANIFEST}: expected digests by file",
    ),
    "half a manifest": (lambda f: (f / MANIFEST).write_text('{"kind'), f"{MANIFEST}: not JSON"),
}


@pytest.mark.parametrize("change, words", CHANGES.values(), ids=CHANGES)
def test_an_export_that_was_changed_is_not_replaced(run, exported, change, words):
    change(exported)
    before = contents(exported)
    assert words in refused(export_run, run, exported)
    assert contents(exported) == before


def test_an_export_is_replaced_file_by_file_and_others_stay(run, exported):
    others = {
        ".git/HEAD": "ref: refs/heads/main",
        "checkpoints/7/theirs": "precious",
        "notes.txt": "precious",
        ".prefixmem.part/half": "of an export that was killed",
    }
    for name, text in others.items():
        (exported / name).parent.mkdir(parents=True, exist_ok=True)
        (exported / name).write_text(text)
    inode, shards = exported.stat().st_ino, sorted(exported.glob("model-*"))
    assert len(shards) > 2
    export_run(run, exported)  # one file of weights instead of several
    after = contents(exported)
    half = others.popitem()[0]
    assert {name: after[name].decode() for name in others} == others and half not in after
    assert exported.stat().st_ino == inode and not (exported / ".prefixmem.part").exists()
    listed = json.loads(after[MANIFEST])["files"]
    assert set(listed) == set(after) - set(others) - {MANIFEST}
    assert "model.safetensors" in listed and not list(exported.glob("model-*"))
    shards[0].write_text("theirs")
    line = refused(export_run, run, exported, max_shard_size="20KB")
    assert f"{shards[0]}: is in the way" in line
    shards[0].unlink()
    assert contents(exported) == after
    (exported / "README.md").unlink()  # what is gone may come back
    export_run(run, exported)
    assert contents(exported) == after


def import_of(model: Path, out: Path) -> Path:
    import_folder(model, out)
    return out


def test_imports_replace_imports_alone(run, exported, model, tmp_path):
    theirs = tmp_path / "theirs"
    (theirs / "checkpoints" / "7").mkdir(parents=True)
    (theirs / "checkpoints" / "7" / "weights").write_text("precious")
    shutil.copy(model / "config.json", theirs)
    ours = import_of(model, tmp_path / "imported")
    for out in (model, exported, run.path, theirs):
        before = contents(out)
        line = refused(import_folder, model, out)
        assert "holds something else than an older import" in line and str(out) in line
        assert contents(out) == before
    assert "something else than an older export" in refused(export_run, run, ours)
    (ours / "checkpoints" / "7").mkdir()
    (ours / "checkpoints" / "7" / "weights").write_text("of a training that used it as its folder")
    before = contents(ours)
    assert "checkpoints/7/weights: is in the way" in refused(import_folder, model, ours)
    assert contents(ours) == before
    shutil.rmtree(ours / "checkpoints" / "7")
    (ours / "notes.txt").write_text("precious")
    import_folder(model, ours)
    again = contents(ours)
    assert set(json.loads(again[MANIFEST])["files"]) == set(again) - {MANIFEST, "notes.txt"}
    assert read_folder(ours).decoder == read_folder(model).decoder


KILLED = """
import os, signal, sys
sys.path.insert(0, {root!r})
from pathlib import Path
from prefixmem_jax.files import replacing_files
left, replace = [int(sys.argv[1])], os.replace
def replace_or_die(*paths):
    if not left[0]:
        os.kill(os.getpid(), signal.SIGKILL)
    left[0] -= 1
    replace(*paths)
os.replace = replace_or_die
with replacing_files(Path(sys.argv[2]), "export", last="config.json") as staged:
    (staged / "deep").mkdir()
    for name in ("config.json", "a", "deep/new"):
        (staged / name).write_text("new " + name)
"""


@pytest.mark.parametrize("first", [True, False], ids=["first export", "over an older one"])
def test_a_swap_that_is_killed_is_done_again(first, tmp_path):
    out, wanted = tmp_path / "out", ("config.json", "a", "deep/new")
    for survived in range(20):
        shutil.rmtree(out, ignore_errors=True)
        if not first:
            with replacing_files(out, "export", last="config.json") as staged:
                (staged / "deep").mkdir()
                for name in ("config.json", "a", "b", "deep/old"):
                    (staged / name).write_text(f"old {name}")
            (out / "notes").write_text("precious")
        script = KILLED.format(root=str(ROOT))
        command = [sys.executable, "-c", script, str(survived), str(out)]
        status = subprocess.run(command).returncode
        assert status in (0, -signal.SIGKILL)
        if status:
            assert not (out / "config.json").exists() or survived == 0
        subprocess.run([*command[:3], "100", str(out)], check=True)
        after = contents(out)
        assert after.pop("notes", b"precious") == b"precious"
        assert set(json.loads(after.pop(MANIFEST))["files"]) == set(wanted)
        assert after == {name: f"new {name}".encode() for name in wanted}
        if not status:
            break
    assert survived == 5  # two manifests and three files


def test_an_interrupted_export_is_done_again(run, exported, monkeypatch):
    expected, replace, left = contents(exported), os.replace, [3]

    def interrupted(*paths):
        left[0] -= 1
        if left[0] == 0:
            raise KeyboardInterrupt
        replace(*paths)

    monkeypatch.setattr("prefixmem_jax.files.os.replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        export_run(run, exported, max_shard_size="20KB")
    assert not (exported / "config.json").exists()
    export_run(run, exported, max_shard_size="20KB")
    assert contents(exported) == expected


def test_checkpoints_beside_an_export_are_not_read_for_it(run, exported, model):
    import_folder(model, exported.parent / "other")
    shutil.copytree(exported.parent / "other" / "checkpoints", exported / "checkpoints")
    spec = run.spec(jax.devices()[:1])
    init = InitConfig(from_huggingface=str(exported))
    loaded = parts_of_folder(spec, init, list(spec.parts), seed=0)
    chex.assert_trees_all_equal(loaded["llm"], run.load(spec, ["llm"])["llm"])


# Where they write.


@pytest.mark.parametrize("size", ["16k", "64k"])
def test_a_full_disk(run, model, tmp_path, size):
    out = tmp_path / "disk"
    with mounted(out, f"size={size}"):
        for failing in ((export_run, run, out), (import_folder, model, out)):
            line = refused(*failing)
            assert f"{out}: {'export' if failing[1] is run else 'import'} failed" in line
            assert not list(out.iterdir())
        (out / "below").mkdir()
        assert "No space left" in refused(export_run, run, out / "below", max_shard_size="9KB")
        assert list(out.iterdir()) == [out / "below"] and not list((out / "below").iterdir())


def test_a_limit_on_files(run, tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))
    try:
        line = refused(export_run, run, tmp_path / "new" / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "export failed" in line and "File too large" in line
    assert not (tmp_path / "new").exists()


def dangling(folder: Path) -> Path:
    (folder / "link").symlink_to(folder / "nowhere")
    return folder / "link"


def under_a_file(folder: Path) -> Path:
    (folder / "file").write_text("precious")
    return folder / "file" / "out"


def a_file(folder: Path) -> Path:
    return under_a_file(folder).parent


PLACES = {
    "gs://": (lambda f: Path("gs://bucket/out"), "expected a folder, not gs://"),
    "s3://": (lambda f: Path("s3://bucket/out"), "expected a folder, not s3://"),
    "a dangling link": (dangling, "which does not exist"),
    "under a file": (under_a_file, "Not a directory"),
    "a file": (a_file, "holds something else than an older"),
    "a long name": (lambda f: f / ("x" * 300), "File name too long"),
    "where nobody may write": (lambda f: Path("/sys/prefixmem"), "failed at"),
}


@pytest.mark.parametrize("place, words", PLACES.values(), ids=PLACES)
def test_places_that_cannot_be_written_to(run, model, place, words, tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    out = place(tmp_path / "here")
    before = contents(tmp_path)
    for line in (refused(export_run, run, out), refused(import_folder, model, out)):
        assert words in line and str(out) in line
    assert contents(tmp_path) == before and "gs:" not in os.listdir()


def test_a_read_only_file_system(run, tmp_path):
    with mounted(tmp_path / "disk", "ro"):
        line = refused(export_run, run, tmp_path / "disk")
        assert "Read-only file system" in line
        line = refused(export_run, run, tmp_path / "disk" / "below")
        assert "Read-only file system" in line


def test_a_mount_point_a_link_and_the_current_folder(run, exported, tmp_path, monkeypatch):
    expected = contents(exported)

    def export_twice(out: Path) -> None:
        for _ in range(2):
            export_run(run, out, max_shard_size="20KB")
            assert contents(out) == expected

    (tmp_path / "target").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "target")
    export_twice(tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    export_twice(Path("."))
    before = contents(tmp_path)
    monkeypatch.chdir(tmp_path)
    assert "holds something else" in refused(export_run, run, Path("."))
    assert contents(tmp_path) == before
    with mounted(tmp_path / "disk", "size=4m"):
        export_twice(tmp_path / "disk")


# What an exported model recommends.


@pytest.fixture(scope="module")
def engine(run):
    return run.engine(devices=jax.devices()[:1])


@pytest.mark.parametrize("beam", [1, BEAM])
def test_recommendations_by_default_are_the_runs(run, engine, exported, beam):
    edit_json(exported / "config.json", lambda c: c["semantic_ids"].update(beam=beam))
    described = json.loads((exported / "config.json").read_text())["semantic_ids"]
    assert described["max_items"] == run.config.data.max_items == 8 and described["items"] == 150
    theirs = AutoModelForCausalLM.from_pretrained(exported, trust_remote_code=True).eval()
    default = None if beam == BEAM else beam
    for history in ([], [3], list(range(8)), list(range(30, 50))):
        for top in (1, 12):
            expected = recommend(engine, history, top, beam=default and max(default, top))
            answer = theirs.recommend(history, top=top)
            assert [(one.item, one.title, one.sid) for one in answer] == [
                (one.item, one.title, one.sid) for one in expected
            ]
            scores = [[one.score for one in found] for found in (answer, expected)]
            np.testing.assert_allclose(*scores, atol=1e-4)
    # What a beam of `top` would give is something else.
    narrow = [recommend(engine, [item], 1, beam=1)[0].sid for item in range(8)]
    wide = [theirs.recommend([item], top=1)[0].sid for item in range(8)]
    assert (narrow == wide) == (beam == 1)
