"""Config files: inheritance, strict overrides, errors that teach, resolved configs that run."""

import dataclasses
import json
import sys
from pathlib import Path

import jax
import pytest
from conftest import ROOT

from prefixmem_jax.config import Config
from prefixmem_jax.config_files import load_config, override, to_json
from prefixmem_jax.config_groups import DecoderConfig, RopeScalingConfig
from prefixmem_jax.data.prepare import data_vocabulary, prepare_data
from prefixmem_jax.errors import UserError
from prefixmem_jax.model_spec import ModelSpec
from prefixmem_jax.objectives.classification import Classification
from prefixmem_jax.parallel.mesh import make_mesh
from prefixmem_jax.sid_encoders.prefix_memory import PrefixMemoryConfig
from prefixmem_jax.training.state import abstract_state
from prefixmem_jax.training.step import abstract_batch, train_step

CONFIGS = sorted(p for p in (ROOT / "configs").rglob("*.py") if p.name != "__init__.py")


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: str(p.relative_to(ROOT)))
def test_every_config_loads_builds_and_lowers(path):
    config = load_config(path)
    mesh = make_mesh(devices=jax.devices()[:1])
    spec = ModelSpec.create(config, data_vocabulary(config.data), mesh)
    with jax.set_mesh(mesh):
        step = jax.jit(lambda state, batch: train_step(spec, state, batch))
        step.lower(abstract_state(spec), abstract_batch(spec))


def test_prefixmem_differs_from_its_baseline_only_in_the_encoder_and_its_own_best_rate():
    folder = ROOT / "configs" / "quickstart"
    ours, base = (load_config(folder / f"{n}.py") for n in ("prefixmem", "baseline"))
    same_rate = dataclasses.replace(ours.optimizer, learning_rate=base.optimizer.learning_rate)
    ours = dataclasses.replace(ours, name=base.name, sid_encoder=None, init=base.init)
    assert dataclasses.replace(ours, optimizer=same_rate) == base


def test_overrides_set_typed_values():
    config = Config("x", sid_encoder=PrefixMemoryConfig())
    for text, read, value in (
        ("optimizer.learning_rate=3e-4", lambda c: c.optimizer.learning_rate, 3e-4),
        ("optimizer.learning_rate=1", lambda c: c.optimizer.learning_rate, 1.0),
        ("optimizer.learning_rate=1e3", lambda c: c.optimizer.learning_rate, 1000.0),
        ("steps=1e3", lambda c: c.steps, 1000),
        ("steps=7", lambda c: c.steps, 7),
        ("data.path=/tmp/a=b", lambda c: c.data.path, "/tmp/a=b"),
        ("data.path=12", lambda c: c.data.path, "12"),
        ("data.path=1e3", lambda c: c.data.path, "1e3"),
        ("data.sid_column=none", lambda c: c.data.sid_column, "none"),
        ("data.path=none", lambda c: c.data.path, None),
        ("data.split=time", lambda c: c.data.split, "time"),
        ("model.remat=full", lambda c: c.model.remat, "full"),
        ("model.remat=none", lambda c: c.model.remat, "none"),
        ("sid_encoder.target_levels=(3,4)", lambda c: c.sid_encoder.target_levels, (3, 4)),
        ("sid_encoder.target_levels=3", lambda c: c.sid_encoder.target_levels, (3,)),
        ("sid_encoder.rows=5000000", lambda c: c.sid_encoder.rows, 5_000_000),
        ("sid_encoder.rows=5e6", lambda c: c.sid_encoder.rows, 5_000_000),
        ("sid_encoder=none", lambda c: c.sid_encoder, None),
        ("sid_encoder=prefix_memory", lambda c: c.sid_encoder, PrefixMemoryConfig()),
        ("objective=classification", lambda c: c.objective, Classification()),
        ("init.take=('memory',)", lambda c: c.init.take, ("memory",)),
        ("init.take=memory", lambda c: c.init.take, ("memory",)),
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
        ("model.qk_norm=1", "model.qk_norm: expected bool, got 1"),
        ("data.split=random", "data.split: 'random' is not one of leave_two_out, time, users"),
        ("objective=clasification", "objective: no kind 'clasification'; did you mean classification?"),
        ("objective=zzz", "objective: no kind 'zzz'; valid here: classification, next_token"),
        ("objective=json:loads", "objective: 'json:loads' names 0 kinds of Objective, expected 1"),
        ("objective=none", "objective: expected the name of a kind"),
        ("sid_encoder.rows=4", "sid_encoder.rows: sid_encoder is none in this config"),
        ("optimizer={'learning_rate': 1}", "optimizer is a group of keys"),
        ("data.codebook_sizes=(9,'x')", "data.codebook_sizes: expected int, got 'x'"),
        ("=3", "an override is key=value"),
        ("steps.x=4", "steps.x: steps is a value, not a group of keys"),
        ("optimizer=3", "optimizer is a group of keys; set one of them, such as optimizer.learning_rate"),
        ("steps", "an override is key=value"),
    ],
)  # fmt: skip
def test_bad_overrides_are_refused(text, words):
    with pytest.raises(UserError) as error:
        override(Config("x"), text)
    assert words in str(error.value) and "\n" not in str(error.value)


# A config with every group of keys in it.
FULL = Config(
    "x",
    model=DecoderConfig(rope_scaling=RopeScalingConfig("linear", 2.0), query_scale=1.0),
    sid_encoder=PrefixMemoryConfig(),
)


def numbers(group, prefix: str = "") -> list[tuple[str, int | float]]:
    """Keys and values of all numbers in a config."""
    found = []
    for item in dataclasses.fields(group):
        value = getattr(group, item.name)
        if dataclasses.is_dataclass(value):
            found += numbers(value, f"{prefix}{item.name}.")
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            found.append((prefix + item.name, value))
    return found


def refusal(config: Config, text: str) -> str:
    with pytest.raises(UserError) as error:
        override(config, text)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("key, value", numbers(FULL))
def test_every_number_has_a_range(key, value):
    assert override(FULL, f"{key}={value}") == FULL
    assert refusal(FULL, f"{key}=-5").startswith(f"{key}: expected ")
    assert "inf" in refusal(FULL, f"{key}=1e999")


@pytest.mark.parametrize(
    "key, good, bad",
    [
        ("seed", ("0", "4294967295"), ("-1", "4294967296")),
        ("steps", ("1",), ("0",)),
        ("data.holdout", ("0.49",), ("0", "0.5")),
        ("data.text_tokens", ("0",), ("-1",)),
        ("data.codebook_sizes", ("(1,)", "none"), ("()", "(4,0)")),
        ("data.synthetic.loyalty", ("0", "1"), ("1.1",)),
        ("data.synthetic.mean_length", ("3",), ("2.9",)),
        ("data.synthetic.zipf_exponent", ("0",), ("-0.1",)),
        ("data.synthetic.codebook_sizes", ("(9,)",), ("(9,-9)",)),
        ("model.logit_softcap", ("none", "0.1"), ("0",)),
        ("model.sliding_layers", ("()", "(0,)"), ("(-1,)",)),
        ("model.sliding_window", ("0",), ("-1",)),
        ("model.init_std", ("1e-9",), ("0",)),
        ("model.rope_scaling.factor", ("0.5",), ("0",)),
        ("optimizer.beta1", ("0", "0.9999"), ("1", "-0.1")),
        ("optimizer.beta2", ("0",), ("1",)),
        ("optimizer.epsilon", ("1e-12",), ("0",)),
        ("optimizer.clip_norm", ("0.1",), ("0",)),
        ("optimizer.weight_decay", ("0",), ("-0.1",)),
        ("optimizer.final_rate", ("0",), ("-0.1",)),
        ("optimizer.warmup_steps", ("0",), ("-1",)),
        ("optimizer.memory.warmup_steps", ("0", "none"), ("-1",)),
        ("optimizer.memory.rate", ("0.1",), ("0",)),
        ("mesh.data", ("-1", "1"), ("0", "-2")),
        ("evaluation.users", ("0",), ("-1",)),
        ("sid_encoder.rows", ("1",), ("0",)),
        ("sid_encoder.target_levels", ("(2,)",), ("(0,)",)),
    ],
)
def test_where_ranges_end(key, good, bad):
    for value in good:
        override(FULL, f"{key}={value}")
    for value in bad:
        assert key in refusal(FULL, f"{key}={value}")


@pytest.mark.parametrize(
    "overrides, words",
    [
        (["model.query_heads=3"], "model.query_heads=3 is not a multiple of model.kv_heads=2"),
        (["model.head_dim=5"], "model.head_dim=5 is odd"),
        (["model.sliding_layers=1"], "model.sliding_window=0: layers (1,) slide"),
        (["model.sliding_layers=2", "model.sliding_window=4"], "layers are 0..1"),
        (["sid_encoder=prefix_memory", "sid_encoder.heads=3"], "sid_encoder.d_mem=256 does not divide by sid_encoder.heads=3"),
        (["optimizer.trainable=sid_encoder"], "trains the SID encoder alone, and sid_encoder is none"),
        (["objective=classification"], "objective=classification trains the SID encoder, and sid_encoder is none"),
        (["data.synthetic.children=(9,9)"], "expected a number for each of the 4 levels"),
    ],
)  # fmt: skip
def test_keys_that_contradict_each_other_are_refused(tmp_path, overrides, words):
    path = write(tmp_path, "parent.py", PARENT)
    with pytest.raises(UserError) as error:
        load_config(path, overrides)
    assert str(error.value).startswith(f"{path}: ") and words in str(error.value)


TOY = """
from dataclasses import dataclass, field
from pydantic import PositiveInt
from prefixmem_jax.objectives.next_token import NextToken
from prefixmem_jax.sid_encoders.sid_encoder import SidEncoderConfig

@dataclass(frozen=True)
class Shape:
    width: PositiveInt = 8
    names: tuple[str, ...] = ()

@dataclass(frozen=True)
class ToyEncoder(SidEncoderConfig):
    rows: PositiveInt = 3
    shape: Shape = field(default_factory=Shape)

    def build(self, vocabulary, d_model, output_std, rngs):
        raise NotImplementedError

@dataclass(frozen=True)
class ToyObjective(NextToken):
    weight: float = 0.5
"""


def test_kinds_may_come_from_anybodys_package(tmp_path, monkeypatch):
    write(tmp_path, "toy.py", TOY)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "toy", raising=False)
    overrides = ["objective=toy:ToyObjective", "objective.weight=2", "sid_encoder=toy:ToyEncoder"]
    overrides += ["sid_encoder.rows=1e2", "sid_encoder.shape.names=a"]
    config = load_config(write(tmp_path, "parent.py", PARENT), overrides)
    import toy

    assert config.objective == toy.ToyObjective(2.0)
    assert config.sid_encoder == toy.ToyEncoder(100, toy.Shape(names=("a",)))
    data = json.loads(to_json(config))
    assert next(iter(data["sid_encoder"].items())) == ("kind", "toy:ToyEncoder")
    assert data["sid_encoder"]["rows"] == 100
    assert load_config(write(tmp_path, "config.json", to_json(config))) == config
    for text, words in (
        ("sid_encoder.rows=0", "sid_encoder.rows: expected"),
        ("sid_encoder.rowz=1", "did you mean sid_encoder.rows?"),
        ("sid_encoder.shape.widht=1", "did you mean sid_encoder.shape.width?"),
        ("sid_encoder=toy:ToyObjective", "names 0 kinds of SidEncoderConfig"),
        ("objective.weight=x", "objective.weight: expected float, got 'x'"),
    ):
        assert words in refusal(config, text)
    broken = dataclasses.replace(config, sid_encoder=toy.ToyEncoder(rows="3"))
    with pytest.raises(UserError, match=r"sid_encoder\.rows: expected int, got '3'"):
        load_config(write(tmp_path, "config.json", to_json(broken)))


def write(folder: Path, name: str, text: str) -> Path:
    (folder / name).write_text(text)
    return folder / name


PARENT = """
from prefixmem_jax.config import Config
def get_config():
    return Config("parent", steps=3)
"""


def test_a_config_inherits_from_a_file_beside_it(tmp_path):
    child = (
        "import dataclasses\n"
        "from prefixmem_jax.config_files import inherit\n"
        "def get_config():\n"
        "    return dataclasses.replace(inherit(__file__, 'parent.py'), name='child')\n"
    )
    known = list(sys.path)
    for folder, steps in (("a", 3), ("b", 4)):  # each folder's own parent, though named alike
        (tmp_path / folder).mkdir()
        write(tmp_path / folder, "parent.py", PARENT.replace("steps=3", f"steps={steps}"))
        config = load_config(write(tmp_path / folder, "child.py", child), ["seed=5"])
        assert (config.name, config.steps, config.seed) == ("child", steps, 5)
    assert sys.path == known and not {"parent", "child"} & set(sys.modules)
    assert not list(tmp_path.rglob("__pycache__"))


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
        ("a.py", "import sys\nsys.exit('no')\n", "a.py: line 2: SystemExit: no"),
        ("a.py", "raise ValueError('two\\nlines')\n", "a.py: line 1: ValueError: two lines"),
        ("a.py", PARENT.replace("steps=3", "steps='3'"), "a.py: steps: expected int, got '3'"),
        ("a.py", PARENT.replace("steps=3", "steps=0"), "a.py: steps: expected greater than 0, got 0"),
        ("a.py", PARENT.replace("steps=3", "model=3"), "a.py: model is a group of keys"),
        ("a.py", PARENT.replace("steps=3", "data=Config('y')"), "a.py: data.name: no such key"),
        ("a.py", PARENT.replace("steps=3", "sid_encoder=Config"), "a.py: sid_encoder: expected the name of a kind"),
        ("a.json", "{", "a.json: not JSON"),
        ("a.json", '{"name": "x", "da', "a.json: not JSON"),
        ("a.json", "[]", "a.json: expected an object of keys, got []"),
        ("a.json", '{"name": "x", "steps": 3.0}', "a.json: steps: expected int, got 3.0"),
        ("a.json", '{"name": "x", "seed": NaN}', "a.json: seed: expected int, got nan"),
        ("a.json", '{"name": "x", "data": {"holdout": NaN}}', "a.json: data.holdout: expected a finite number"),
        ("a.json", '{"name": "x", "objective": {}}', "a.json: objective: expected the name of a kind"),
        ("a.json", '{"name": "x", "objective": {"kind": "zzz"}}', "a.json: objective: no kind 'zzz'"),
        ("a.json", '{"name": "x", "sid_encoder": {"kind": "prefix_memory", "head": 1}}', "sid_encoder.head: no such key; did you mean sid_encoder.heads?"),
        ("a.json", '{"name": "x", "stepz": 1}', "a.json: stepz: no such key; did you mean steps?"),
        ("a.json", '{"name": "x", "data": {"pat": 1}}', "data.pat: no such key"),
        ("a.json", "{}", "a.json: name is missing"),
        ("a.txt", "", "a config file ends in .py or .json"),
    ],
)  # fmt: skip
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
    vocabulary = prepare_data(config).vocabulary
    assert vocabulary == data_vocabulary(config)
    assert vocabulary.token_range(1)[0] == 1002 and vocabulary.bos_token == 1001


def test_codebook_sizes_without_data_are_refused():
    config = load_config(ROOT / "configs" / "qwen3_1p7b" / "prefixmem.py")
    with pytest.raises(UserError, match=r"data\.path is none"):
        prepare_data(config.data)
