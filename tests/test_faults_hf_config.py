"""Faults in config.json of Hugging Face folders: each is one line that names file and key."""

import dataclasses
import shutil
from pathlib import Path

import pytest
from hf_folders import edit_json, refused, save_model
from models import DECODER, make_run, small_config

from prefixmem_jax.convert import export_run, import_folder
from prefixmem_jax.hf.families import read_folder

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


def keys(**changes):
    return lambda config: config.update(changes)


def within(group: str, **changes):
    return lambda config: config[group].update(changes)


def old_rope(value: object):
    """As configs said it before `rope_parameters`."""

    def change(config: dict) -> None:
        del config["rope_parameters"]
        config["rope_theta"] = value

    return change


CONFIGS = {
    "layers a word": (keys(num_hidden_layers="three"), "num_hidden_layers' expected int, got str"),
    "layers -1": (keys(num_hidden_layers=-1), "`num_hidden_layers` (-1) must be"),
    "layers -1, of no types": (
        keys(num_hidden_layers=-1, layer_types=[]),
        "`num_hidden_layers` (-1) must be",
    ),
    "width 0": (keys(hidden_size=0), "hidden_size: expected greater than 0, got 0"),
    "heads 0": (keys(num_attention_heads=0), "num_attention_heads: expected greater than 0, got 0"),
    "odd kv heads": (
        keys(num_key_value_heads=3),
        "num_attention_heads=4 is not a multiple of num_key_value_heads=3",
    ),
    "vocab_size -1": (keys(vocab_size=-1), "vocab_size: expected 1 or more, got -1"),
    "epsilon 0": (keys(rms_norm_eps=0.0), "rms_norm_eps: expected greater than 0, got 0"),
    "rope null": (old_rope(None), "rope_theta: expected a valid number, got None"),
    "rope a word": (old_rope("x"), "rope_theta: expected a valid number, got 'x'"),
    "rope null in its group": (
        within("rope_parameters", rope_theta=None),
        "rope_theta: expected a valid number, got None",
    ),
    "rope without its factor": (
        within("rope_parameters", rope_type="linear"),
        "Missing required keys in `rope_parameters` for 'rope_type'='linear': {'factor'}",
    ),
    "rope of a list": (keys(rope_parameters=[1]), "rope_parameters"),
    "an unknown kind": (keys(model_type="qwen99"), "model_type 'qwen99'; expected one of qwen3,"),
    "a kind that is a list": (keys(model_type=[]), "model_type []; expected one of qwen3, llama,"),
    "no kind": (lambda config: config.pop("model_type"), "model_type None; expected one of qwen3"),
    "an unknown dtype": (keys(dtype="float99"), "dtype 'float99'; expected one of auto, float64,"),
    "dtype a list": (keys(dtype=[]), "dtype []; expected one of auto, float64, float32,"),
    "an activation": (keys(hidden_act="relu6"), "activation 'relu6' is not supported"),
    "text_config": (keys(prefix_memory={}), "text_config: expected an object, got None"),
}
MALFORMED = {
    "memory a list": (keys(prefix_memory=[]), "prefix_memory: expected an object, got []"),
    "memory null": (keys(prefix_memory=None), "prefix_memory: expected an object, got None"),
    "no address": (
        lambda config: config["prefix_memory"].pop("address"),
        "prefix_memory is malformed: address is missing",
    ),
    "an unknown address": (
        within("prefix_memory", address="hashed"),
        "prefix_memory is malformed: address: expected 'prefix', 'suffix' or 'full_prefix', got 'h",
    ),
    "an unknown dtype of rows": (
        within("prefix_memory", dtype="float99"),
        "prefix_memory is malformed: dtype: expected 'float32' or 'bfloat16', got 'float99'",
    ),
    "rows a word": (
        within("prefix_memory", rows="many"),
        "prefix_memory is malformed: rows: expected a valid integer, got 'many'",
    ),
    "levels beyond": (
        within("prefix_memory", target_levels=[2, 9]),
        "prefix_memory is malformed: target_levels=(2, 9): level 9 is outside 1..4",
    ),
    "multipliers too few": (
        within("prefix_memory", multipliers=[[1, 2]]),
        "prefix_memory is malformed: multipliers: expected 4 x 2 integers below 2^32",
    ),
    "multipliers words": (within("prefix_memory", multipliers="x"), "multipliers: expected 4 x 2"),
    "an unknown key": (within("prefix_memory", colour=1), "prefix_memory is malformed: colour: Un"),
    "text_tokens a word": (
        within("semantic_ids", text_tokens="a"),
        "semantic_ids is malformed: text_tokens: expected a valid integer, got 'a'",
    ),
    "text_tokens -1": (
        within("semantic_ids", text_tokens=-1),
        "text_tokens: expected greater than or equal to 0, got -1",
    ),
    "text_tokens too many": (
        within("semantic_ids", text_tokens=99),
        "text_tokens 99 and codebook_sizes (6, 8, 7, 9) make 131 tokens, vocab_size is 32",
    ),
    "codebook_sizes a number": (
        within("semantic_ids", codebook_sizes=6),
        "codebook_sizes: expected a valid array, got 6",
    ),
    "codebook_sizes with 0": (
        within("semantic_ids", codebook_sizes=[6, 0]),
        "codebook_sizes.1: expected greater than 0, got 0",
    ),
    "no codebook_sizes": (within("semantic_ids", codebook_sizes=[]), "codebook_sizes: Tuple"),
    "semantic_ids null": (keys(semantic_ids=None), "semantic_ids: expected an object, got None"),
    "text_config null": (keys(text_config=None), "text_config: expected an object, got None"),
    "text_config of a word": (
        within("text_config", hidden_size="wide"),
        "'hidden_size' expected int, got str",
    ),
}
BYTES = {
    "latin-1": ('{"ä": 1}'.encode("latin-1"), "not JSON ('utf-8' codec can't decode byte 0xe4"),
    "truncated": (b'{"model_type": "qwe', "not JSON (Unterminated string"),
    "empty": (b"", "not JSON (Expecting value"),
    "a list": (b"[]", "expected a JSON object, got list"),
    "null": (b"null", "expected a JSON object, got NoneType"),
    "deep": (b'{"a":' * 100_000, "not JSON (maximum recursion depth exceeded"),
}


def check_config(folder: Path, words: str) -> None:
    for read in (read_folder, lambda f: import_folder(f, f.parent / "out")):
        line = refused(read, folder)
        assert words in line and line.startswith(f"{folder / 'config.json'}: ")
    assert not (folder.parent / "out").exists()


@pytest.mark.parametrize("change, words", CONFIGS.values(), ids=CONFIGS)
def test_wrong_keys_of_a_stock_config(model, change, words):
    edit_json(model / "config.json", change)
    check_config(model, words)


@pytest.mark.parametrize("change, words", MALFORMED.values(), ids=MALFORMED)
def test_wrong_keys_of_an_exported_config(exported, change, words):
    edit_json(exported / "config.json", change)
    check_config(exported, words)


@pytest.mark.parametrize("content, words", BYTES.values(), ids=BYTES)
def test_configs_that_are_no_json_object(model, content, words):
    (model / "config.json").write_bytes(content)
    check_config(model, words)
