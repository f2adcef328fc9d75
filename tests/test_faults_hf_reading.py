"""Faults in what Hugging Face folders hold, injected for real: each is one line that names it."""

import dataclasses
import json
import os
import shutil
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from conftest import prefixmem
from hf_folders import TEXT_TOKENS, edit_json, refused, save_model
from models import DECODER, make_run, small_config
from safetensors.numpy import load_file, save_file
from transformers import AutoConfig
from transformers.dynamic_module_utils import get_class_from_dynamic_module

from prefixmem_jax.convert import export_run, import_folder
from prefixmem_jax.hf.families import read_folder
from prefixmem_jax.hf.tokenizer import text_tokenizer
from prefixmem_jax.semantic_ids.catalog import Catalog

ONE_LAYER = dataclasses.replace(DECODER, layers=1)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    config = small_config(ONE_LAYER, 0)
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


# Weights.


def rename_first(change) -> object:
    """A fault of the index: its first tensor is said to lie in another file."""

    def inject(folder: Path) -> None:
        def move(index: dict) -> None:
            name = next(iter(index["weight_map"]))
            index["weight_map"][name] = change(folder, index["weight_map"][name])

        edit_json(folder / INDEX, move)

    return inject


def through_a_link(folder: Path, name: str) -> str:
    (folder.parent / "elsewhere").mkdir()
    shutil.copy(folder / name, folder.parent / "elsewhere")
    (folder / "link").symlink_to(folder.parent / "elsewhere")
    return f"link/{name}"


def weights_changed(tensor: str, change):
    def inject(folder: Path) -> None:
        file = folder / json.loads((folder / INDEX).read_text())["weight_map"][tensor]
        tensors = load_file(file)
        tensors[tensor] = change(tensors[tensor])
        save_file(tensors, file, {"format": "pt"})

    return inject


def with_one(value: float, dtype: type = np.float32):
    def change(array: np.ndarray) -> np.ndarray:
        array = array.astype(dtype)
        array.flat[5] = value
        return array

    return change


INDEX = "model.safetensors.index.json"
LAYER, NORM = "model.layers.1.mlp.up_proj.weight", "model.norm.weight"
BESIDE = "expected a file beside the index, got"
WEIGHTS = {
    "../": (rename_first(lambda f, name: f"../qwen3/{name}"), f"{BESIDE} '../qwen3/"),
    "an absolute path": (rename_first(lambda f, name: str(f / name)), f"{BESIDE} '/"),
    "out through a link": (rename_first(through_a_link), f"{BESIDE} 'link/"),
    "null": (rename_first(lambda f, name: None), f"{BESIDE} None"),
    "a list": (rename_first(lambda f, name: [name]), f"{BESIDE} ['model-"),
    "a number": (rename_first(lambda f, name: 3), f"{BESIDE} 3"),
    "..": (rename_first(lambda f, name: ".."), f"{BESIDE} '..'"),
    "no such file": (rename_first(lambda f, name: "gone"), "gone is missing"),
    "another file": (
        rename_first(lambda f, name: next(p.name for p in f.glob("model-*") if p.name != name)),
        "lm_head.weight is not in model-0000",
    ),
    "weight_map null": (
        lambda f: edit_json(f / INDEX, lambda i: i.update(weight_map=None)),
        f"{INDEX}: weight_map: expected files by tensor, got None",
    ),
    "weight_map a list": (
        lambda f: edit_json(f / INDEX, lambda i: i.update(weight_map=["a"])),
        f"{INDEX}: weight_map: expected files by tensor, got ['a']",
    ),
    "no weight_map": (
        lambda f: edit_json(f / INDEX, lambda i: i.clear()),
        f"{INDEX}: expected JSON with a weight_map ('weight_map')",
    ),
    "an index that is a list": (
        lambda f: (f / INDEX).write_text("[]"),
        f"{INDEX}: expected JSON with a weight_map (list",
    ),
    "half an index": (
        lambda f: (f / INDEX).write_bytes((f / INDEX).read_bytes()[:100]),
        f"{INDEX}: expected JSON with a weight_map (Expecting",
    ),
    "an index in latin-1": (
        lambda f: (f / INDEX).write_bytes("{'ä'}".encode("latin-1")),
        f"{INDEX}: expected JSON with a weight_map ('utf-8' codec can't decode",
    ),
    "integers": (
        weights_changed(LAYER, lambda a: a.astype(np.int8)),
        f"{LAYER}: dtype I8, expected one of F64, F32, F16, BF16",
    ),
    "NaN in a layer": (
        weights_changed(LAYER, with_one(np.nan)),
        f"tensor {LAYER} has numbers that are not finite",
    ),
    "inf": (
        weights_changed(NORM, with_one(-np.inf)),
        f"tensor {NORM} has numbers that are not finite",
    ),
    "NaN in bfloat16": (
        weights_changed(NORM, with_one(np.nan, ml_dtypes.bfloat16)),
        f"tensor {NORM} has numbers that are not finite",
    ),
}


@pytest.mark.parametrize("inject, words", WEIGHTS.values(), ids=WEIGHTS)
def test_weights_that_are_not_what_they_should_be(model, inject, words, tmp_path):
    inject(model)
    line = refused(import_folder, model, tmp_path / "out")
    assert words in line and str(model) in line
    assert not (tmp_path / "out").exists()


def test_not_finite_rows_of_a_memory(exported, tmp_path):
    name = "prefix_memory.tables.3.weight"
    weights_changed(name, with_one(np.nan))(exported)
    assert f"tensor {name} has numbers" in refused(import_folder, exported, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_files_that_are_links_are_read(model, tmp_path):
    """The cache of downloads is made of them."""
    (tmp_path / "blobs").mkdir()
    for number, path in enumerate(sorted(model.iterdir())):
        blob = tmp_path / "blobs" / str(number)
        path.rename(blob)
        path.symlink_to(blob)
    import_folder(model, tmp_path / "out")
    assert not any(path.is_symlink() for path in (tmp_path / "out").rglob("*"))


# The catalogue of an exported folder.


def items_changed(change):
    def inject(folder: Path) -> None:
        lines = (folder / "items.jsonl").read_text().splitlines(keepends=True)
        (folder / "items.jsonl").write_text("".join(change(lines)))

    return inject


def with_line(number: int, **keys):
    def change(lines: list[str]) -> list[str]:
        lines[number] = json.dumps({**json.loads(lines[number]), **keys}) + "\n"
        return lines

    return items_changed(change)


ITEMS = {
    "a line missing": (items_changed(lambda x: x[:7] + x[8:]), "line 8: item is 8, expected 7"),
    "a line twice": (items_changed(lambda x: x[:8] + x[7:]), "line 9: item is 7, expected 8"),
    "two lines changed places": (
        items_changed(lambda x: [x[1], x[0], *x[2:]]),
        "line 1: item is 1, expected 0",
    ),
    "the last line missing": (items_changed(lambda x: x[:-1]), "149 items, expected 150"),
    "half the last line": (
        items_changed(lambda x: [*x[:-1], x[-1][:9]]),
        "line 150: not a JSON object",
    ),
    "a line in latin-1": (
        lambda f: (f / "items.jsonl").write_bytes('{"item": 0, "ä"}\n'.encode("latin-1")),
        "line 1: not a JSON object",
    ),
    "no lines": (items_changed(lambda x: []), "0 items, expected 150"),
    "a code too few": (with_line(4, sid=[1, 2, 3]), "line 5: sid is [1, 2, 3], expected 4 codes"),
    "a code out of range": (with_line(4, sid=[1, 8, 0, 0]), "line 5: sid level 2 is 8, expected"),
    "a code that is text": (with_line(4, sid=[1, "2", 0, 0]), "line 5: sid level 2 is '2', expect"),
    "a title that is none": (with_line(4, title=3), "line 5: title is 3, expected a string"),
    "an item that is text": (with_line(4, item="4"), "line 5: item is '4', expected 4"),
}


@pytest.fixture(scope="module")
def described(exported_once):
    config = AutoConfig.from_pretrained(exported_once, trust_remote_code=True)
    return config, get_class_from_dynamic_module("sid_catalog.Catalog", str(exported_once))


@pytest.mark.parametrize("inject, words", ITEMS.values(), ids=ITEMS)
def test_a_catalogue_with_lines_that_are_not_its_items(exported, described, inject, words):
    config, catalog = described
    assert len(catalog.from_pretrained(str(exported), config).sids) == 150
    inject(exported)
    with pytest.raises(ValueError) as caught:
        catalog.from_pretrained(str(exported), config)
    line = str(caught.value)
    assert words in line and str(exported / "items.jsonl") in line and "\n" not in line


TITLES = [
    "half a \ud83d pair",
    "\0 \r\n \u2028 \x85",
    '"\\ud800"',
    "```\n---\n# |",
    "",
    None,
    "日本 🎈",
]


def test_titles_and_names_of_any_characters(exported, described, run, monkeypatch, tmp_path):
    catalog = run.catalog()
    titles = [TITLES[item % len(TITLES)] for item in range(len(catalog))]
    config = dataclasses.replace(run.config, name="a\nname \udcff\n---\n```")
    renamed = Catalog(catalog.sids, titles, catalog.space)
    monkeypatch.setattr(run, "config", config)
    export_run(run, tmp_path / "out", catalog=renamed)
    theirs = described[1].from_pretrained(str(tmp_path / "out"), described[0])
    ours = Catalog.read_jsonl(tmp_path / "out" / "items.jsonl", catalog.space.codebook_sizes)
    assert theirs.titles == ours.titles == titles
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8").splitlines()
    assert card.count("---") == 2 and "# a name \\udcff --- ```" in card


# Tokenizers.


@pytest.fixture(scope="module")
def text_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("faults") / "text"
    folder.mkdir()
    return make_run(folder, small_config(DECODER, TEXT_TOKENS))


def remove(*names: str):
    return lambda folder: [(folder / name).unlink() for name in names]


def put(name: str, content: bytes):
    return lambda folder: (folder / name).write_bytes(content)


TOKENIZERS = {
    "none": (remove("tokenizer.json", "tokenizer_config.json"), "qwen3: no tokenizer there; expec"),
    "no vocabulary": (remove("tokenizer.json"), "qwen3: no tokenizer there; expected one of token"),
    "half a vocabulary": (put("tokenizer.json", b'{"version": "1'), "tokenizer.json: not JSON"),
    "an empty vocabulary": (put("tokenizer.json", b"{}"), "tokenizer.json: makes no tokenizer"),
    "a vocabulary that is a list": (
        put("tokenizer.json", b"[]"),
        "tokenizer.json: expected a JSON",
    ),
    "a vocabulary in latin-1": (
        put("tokenizer.json", b'{"\xe4"}'),
        "tokenizer.json: not JSON ('ut",
    ),
    "half a config": (put("tokenizer_config.json", b"{"), "tokenizer_config.json: not JSON"),
    "a config that is null": (
        put("tokenizer_config.json", b"null"),
        "tokenizer_config.json: expected a JSON object, got NoneType",
    ),
    "a config with a wrong value": (
        put("tokenizer_config.json", b'{"eos_token": 3}'),
        "tokenizer_config.json: makes no tokenizer",
    ),
}


@pytest.mark.parametrize("inject, words", TOKENIZERS.values(), ids=TOKENIZERS)
def test_tokenizers_that_cannot_be_read(text_run, model, inject, words, tmp_path):
    inject(model)
    line = refused(export_run, text_run, tmp_path / "out", tokenizer=str(model))
    assert words in line and str(model) in line
    assert not (tmp_path / "out").exists()
    if (model / "tokenizer_config.json").exists():  # where the config is read, it is counted
        assert words in refused(read_folder, model)
        assert words in refused(text_tokenizer, model)


def test_metrics_that_no_evaluation_wrote(run, tmp_path):
    path = run.path / "metrics.json"
    try:
        for content, words in (("{", "not JSON"), ('{"step": 0}', "not what an evaluation wrote")):
            path.write_text(content)
            assert f"{path}: {words}" in refused(export_run, run, tmp_path / "out")
            assert not (tmp_path / "out").exists()
    finally:
        path.unlink()


def test_on_the_command_line_each_is_one_line(run, model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    weights_changed(LAYER, with_one(np.nan))(model)
    for arguments, words in (
        (
            ("export", run.path, "--out", "az://bucket/out"),
            "az://bucket/out: expected a folder, gs:// or s3://",
        ),
        (("import", model, "--out", "out"), f"tensor {LAYER} has numbers that are not finite"),
    ):
        failed = prefixmem(*arguments, expect=2)
        assert words in failed.stderr and len(failed.stderr.strip().splitlines()) == 1
    assert os.listdir() == ["qwen3"]
