"""Config files: inheritance, strict overrides, errors that teach, resolved configs that run."""

import dataclasses
from pathlib import Path

import jax
import pytest
from conftest import ROOT

from prefixmem_jax.config import Config, PrefixMemoryConfig
from prefixmem_jax.config_files import load_config, override, to_json
from prefixmem_jax.data.prepare import data_space, prepare_data
from prefixmem_jax.errors import UserError
from prefixmem_jax.parallel.mesh import make_mesh
from prefixmem_jax.training.step import Trainer

CONFIGS = sorted(p for p in (ROOT / "configs").rglob("*.py") if p.name != "__init__.py")


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: str(p.relative_to(ROOT)))
def test_every_config_loads_builds_and_lowers(path):
    config = load_config(path)
    trainer = Trainer.create(config, data_space(config.data), make_mesh(devices=jax.devices()[:1]))
    state = trainer.abstract_state()
    assert jax.tree.leaves(state.params)
    with jax.set_mesh(trainer.mesh):
        jax.jit(trainer.train_step).lower(state, trainer.abstract_batch())


def test_prefixmem_differs_from_its_baseline_only_in_the_encoder_and_its_own_best_rate():
    folder = ROOT / "configs" / "quickstart"
    ours, base = (load_config(folder / f"{n}.py") for n in ("prefixmem", "baseline"))
    same_rate = dataclasses.replace(ours.optimizer, learning_rate=base.optimizer.learning_rate)
    ours = dataclasses.replace(ours, name=base.name, encoder=None, init=base.init)
    assert dataclasses.replace(ours, optimizer=same_rate) == base


def test_overrides_set_typed_values():
    config = Config("x", encoder=PrefixMemoryConfig())
    for text, read, value in (
        ("optimizer.learning_rate=3e-4", lambda c: c.optimizer.learning_rate, 3e-4),
        ("optimizer.learning_rate=1", lambda c: c.optimizer.learning_rate, 1.0),
        ("steps=7", lambda c: c.steps, 7),
        ("data.path=/tmp/a=b", lambda c: c.data.path, "/tmp/a=b"),
        ("data.path=12", lambda c: c.data.path, "12"),
        ("data.path=none", lambda c: c.data.path, None),
        ("data.split=time", lambda c: c.data.split, "time"),
        ("model.remat=true", lambda c: c.model.remat, True),
        ("encoder.target_levels=(3,4)", lambda c: c.encoder.target_levels, (3, 4)),
        ("encoder.target_levels=3", lambda c: c.encoder.target_levels, (3,)),
        ("encoder.rows=5000000", lambda c: c.encoder.rows, 5_000_000),
        ("encoder=none", lambda c: c.encoder, None),
        ("init.take=('memory',)", lambda c: c.init.take, ("memory",)),
    ):
        found = read(override(config, text))
        assert found == value and type(found) is type(value)


@pytest.mark.parametrize(
    "text, words",
    [
        ("optimizer.learning_rat=1", "optimizer.learning_rat: no such key; did you mean optimizer.learning_rate?"),
        ("optimiser.learning_rate=1", "did you mean optimizer?"),
        ("zzz=1", "valid here: name, objective"),
        ("steps=many", "steps: expected int, got 'many'"),
        ("steps=1.5", "steps: expected int, got 1.5"),
        ("steps=true", "steps: expected int, got True"),
        ("model.remat=1", "model.remat: expected bool, got 1"),
        ("data.split=random", "data.split: 'random' is not one of leave_two_out, time, users"),
        ("encoder.rows=4", "encoder.rows: encoder is none in this config"),
        ("steps.x=4", "steps.x: steps is a value, not a group of keys"),
        ("optimizer=3", "optimizer is a group of keys; set one of them, such as optimizer.learning_rate"),
        ("steps", "an override is key=value"),
    ],
)  # fmt: skip
def test_bad_overrides_are_refused(text, words):
    with pytest.raises(UserError) as error:
        override(Config("x"), text)
    assert words in str(error.value) and "\n" not in str(error.value)


def write(folder: Path, name: str, text: str) -> Path:
    (folder / name).write_text(text)
    return folder / name


PARENT = """
from prefixmem_jax.config import Config
def get_config():
    return Config("parent", steps=3)
"""


def test_a_config_inherits_by_calling_its_parent(tmp_path):
    child = (
        "import dataclasses, parent\n"
        "def get_config():\n"
        "    return dataclasses.replace(parent.get_config(), name='child')\n"
    )
    for folder, steps in (("a", 3), ("b", 4)):  # each folder's own parent, though named alike
        (tmp_path / folder).mkdir()
        write(tmp_path / folder, "parent.py", PARENT.replace("steps=3", f"steps={steps}"))
        config = load_config(write(tmp_path / folder, "child.py", child), ["seed=5"])
        assert (config.name, config.steps, config.seed) == ("child", steps, 5)


def test_a_resolved_config_loads_the_same(tmp_path):
    for path in CONFIGS:
        config = load_config(path, ["steps=17", "data.codebook_sizes=(9,9,9,9)"])
        assert load_config(write(tmp_path, "config.json", to_json(config))) == config


@pytest.mark.parametrize(
    "name, text, words",
    [
        ("a.py", "x = 1\n", "a.py: defines no get_config()"),
        ("a.py", "def get_config():\n    return 3\n", "get_config() returned int"),
        ("a.py", "def get_config():\n    return missing\n", "a.py: line 2: NameError"),
        ("a.py", "def get_config(:\n", "a.py: line 1: SyntaxError"),
        ("a.py", PARENT.replace("steps=3", "steps='3'"), "steps: expected int, got '3'"),
        ("a.py", PARENT.replace("steps=3", "steps=0"), "steps: expected more than 0, got 0"),
        ("a.py", PARENT.replace("steps=3", "objective='classification'"), "encoder is none"),
        ("a.json", "{", "a.json: not JSON"),
        ("a.json", '{"name": "x", "stepz": 1}', "a.json: stepz: no such key; did you mean steps?"),
        ("a.json", '{"name": "x", "data": {"pat": 1}}', "data.pat: no such key"),
        ("a.json", "{}", "missing 1 required positional argument: 'name'"),
        ("a.txt", "", "a config file ends in .py or .json"),
    ],
)
def test_bad_config_files_are_refused(tmp_path, name, text, words):
    with pytest.raises(UserError) as error:
        load_config(write(tmp_path, name, text))
    assert words in str(error.value) and "\n" not in str(error.value)
    with pytest.raises(UserError, match="no such config file"):
        load_config(tmp_path / "nowhere.py")


def test_a_text_vocabulary_stands_before_the_sid_tokens():
    config = dataclasses.replace(
        load_config(ROOT / "configs/quickstart/baseline.py").data, text_tokens=1000
    )
    space = prepare_data(config).catalog.space
    assert space == data_space(config)
    assert space.token_range(1)[0] == 1002 and space.bos_token == 1001


def test_codebook_sizes_without_data_are_refused():
    config = load_config(ROOT / "configs" / "qwen3_1p7b" / "prefixmem.py")
    with pytest.raises(UserError, match=r"data\.path is none"):
        prepare_data(config.data)
