"""The house's own rules, read from its sources: what may import what, and who may know what."""

import ast
import functools
import graphlib
import re
import runpy
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from conftest import ROOT
from flax import nnx
from jax.sharding import PartitionSpec as P

from prefixmem_jax.config_files import load_config
from prefixmem_jax.data.prepare import data_vocabulary
from prefixmem_jax.kinds import files_of
from prefixmem_jax.objectives.objective import Objective
from prefixmem_jax.parallel.mesh import make_mesh
from prefixmem_jax.parallel.parameters import abstract_parameters, normal, parameter
from prefixmem_jax.parallel.sharding import RULES
from prefixmem_jax.sid_encoders.sid_encoder import SidEncoderConfig

PACKAGE = ROOT / "prefixmem_jax"
# Files and folders of the package, each of which imports only from those before it.
ROOMS = [
    "errors", "text", "progress", "storage", "files", "page", "kinds", "config_groups", "parallel", "semantic_ids",
    "data", "memory", "layers", "sid_encoders", "models", "objectives", "config", "config_files", "model_spec", "inference",
    "hf", "runs", "evaluation", "training_rows", "training", "planning", "recommender", "inspection", "convert", "quantizer_training", "sids", "quickstart", "start", "sweep",
    "benchmarks", "paper", "cli",
]  # fmt: skip
# Written into exported folders, where the package is not.
EXPORTED = PACKAGE / "hf" / "exported"
FILES = sorted(PACKAGE.rglob("*.py"))
OWN_FILES = [path for path in FILES if path.parent != EXPORTED]


@functools.cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def name_of(path: Path) -> str:
    """`memory/table.py` for a file of the package."""
    return str(path.relative_to(PACKAGE))


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def file_of(module: str) -> Path | None:
    """The file of a dotted module of the package."""
    path = ROOT.joinpath(*module.split("."))
    candidates = (path.with_suffix(".py"), path / "__init__.py")
    return next((file for file in candidates if file.is_file()), None)


def imported_files(path: Path) -> set[Path]:
    """Files of the package that a file imports, at its top or anywhere within."""
    modules: list[str] = []
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Import):
            modules += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{name_of(path)}: a relative import"
            # What is imported may be a file of the module, or something in it.
            inner = [f"{node.module}.{alias.name}" for alias in node.names]
            modules += [name if file_of(name) else node.module for name in inner]
    return {file_of(name) for name in modules if name.split(".")[0] == PACKAGE.name} - {None}


def test_every_room_is_in_the_order():
    rooms = {room_of(path) for path in FILES} - {"__init__"}
    assert rooms == set(ROOMS) and len(ROOMS) == len(rooms)


def test_imports_run_downwards():
    assert not imported_files(PACKAGE / "__init__.py")
    upwards = []
    for path in set(OWN_FILES) - {PACKAGE / "__init__.py"}:
        allowed = ROOMS[: ROOMS.index(room_of(path)) + 1]
        upwards += [
            f"{name_of(path)} imports {name_of(file)}"
            for file in imported_files(path)
            if room_of(file) not in allowed
        ]
    assert upwards == []


def test_no_files_import_each_other_in_a_circle():
    graph = {path: imported_files(path) for path in OWN_FILES}
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        pytest.fail(" -> ".join(map(name_of, error.args[1])))


def test_exported_files_need_nothing_of_the_package():
    for path in EXPORTED.glob("*.py"):
        assert PACKAGE.name not in imported_roots(path), name_of(path)
        assert "jax" not in imported_roots(path), name_of(path)


def imported_roots(path: Path) -> set[str]:
    """Top-level packages that a file imports."""
    roots = set()
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Import):
            roots |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            roots.add(node.module.split(".")[0])
    return roots


def test_all_that_is_imported_is_installed(monkeypatch):
    """What a wheel holds: setup.py has to name every folder."""
    said = {}
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("setuptools.setup", lambda **keys: said.update(keys))
    runpy.run_path("setup.py")
    folders = {p.parent.relative_to(ROOT) for p in OWN_FILES}
    folders |= {"prefixmem_jax" / p.parent.relative_to(ROOT) for p in ROOT.glob("configs/**/*.py")}
    assert {".".join(folder.parts) for folder in folders} == set(said["packages"])


def test_no_file_is_long():
    lines = {name_of(path): len(path.read_text().splitlines()) for path in FILES}
    assert {name: count for name, count in lines.items() if count > 400} == {}


def calls(path: Path, *functions: str) -> list[int]:
    """Lines in which a file calls one of these."""
    return [
        node.lineno
        for node in ast.walk(tree_of(path))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and node.func.id in functions
    ]


def test_nothing_prints_but_the_command_line_and_benchmarks():
    for path in OWN_FILES:
        if room_of(path) not in ("cli", "benchmarks"):
            assert not calls(path, "print"), name_of(path)


def test_step_and_model_ask_nobody_what_kind_it_is():
    for name in ("training/step.py", "training/loop.py", "training/hooks.py", "models/sid_lm.py"):
        assert not calls(PACKAGE / name, "isinstance", "issubclass", "type", "hasattr"), name


def test_step_and_loop_name_no_objective_and_no_sid_encoder():
    kinds = set()
    for base in (Objective, SidEncoderConfig):
        for file in files_of(base.package):
            path = file_of(f"{base.package}.{file}")
            kinds |= {file} | {
                n.name for n in ast.walk(tree_of(path)) if isinstance(n, ast.ClassDef)
            }
    assert {"next_token", "NextToken", "prefix_memory", "PrefixMemory"} <= kinds
    for name in ("step", "loop", "hooks", "state", "parts"):
        words = set(re.findall(r"\w+", (PACKAGE / "training" / f"{name}.py").read_text()))
        assert not words & kinds, name


# What says where tokens of some sort begin or end.
TOKEN_IDS = frozenset({"text_tokens", "pad_token", "bos_token", "sid_offset", "token_range"})


def token_arithmetic(tree: ast.AST) -> list[int]:
    """Lines that calculate with such numbers, or with names that were given one."""
    names = set(TOKEN_IDS)

    def mentions(node: ast.AST) -> bool:
        if isinstance(node, ast.Call):  # what it is given is its own affair
            return mentions(node.func)
        if isinstance(node, ast.JoinedStr):
            return False
        named = getattr(node, "id", getattr(node, "attr", getattr(node, "value", None)))
        if isinstance(named, str) and named in names:
            return True
        return any(map(mentions, ast.iter_child_nodes(node)))

    def bound(target: ast.AST) -> set[str]:
        if isinstance(target, ast.Name):
            return {target.id}
        return set().union(*map(bound, getattr(target, "elts", ())))

    for node in ast.walk(tree):
        if isinstance(node, ast.Assign) and mentions(node.value):
            names |= set().union(*map(bound, node.targets))
    return [
        node.lineno
        for node in ast.walk(tree)
        if (isinstance(node, ast.BinOp) and (mentions(node.left) or mentions(node.right)))
        or (isinstance(node, ast.AugAssign) and (mentions(node.target) or mentions(node.value)))
    ]


def functions_of(path: Path) -> list[ast.AST]:
    """Functions, each with its own names; and the file."""
    tree = tree_of(path)
    return [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)] or [tree]


def test_nobody_but_the_vocabulary_calculates_with_token_ids():
    vocabulary = PACKAGE / "semantic_ids" / "vocabulary.py"
    assert any(map(token_arithmetic, functions_of(vocabulary)))
    for path in OWN_FILES:
        if path != vocabulary:
            for function in functions_of(path):
                assert not token_arithmetic(function), name_of(path)


@pytest.mark.parametrize(
    "line, calculates",
    [
        ("x = vocabulary.text_tokens + 1", True),
        ("x = 2 * (tokens - self.vocabulary.token_range(1)[0])", True),
        ("start, stop = v.token_range(level)\nx = tokens - start", True),
        ("x = sids['text_tokens'] + 2", True),
        ("offset += vocabulary.bos_token", True),
        ("x = [vocabulary.bos_token, *tokens]", False),
        ("x = table[slice(*vocabulary.token_range(level))] / 2", False),
        ("x = Vocabulary(space, text_tokens).size - 1", False),
        ("x = f'{vocabulary.text_tokens} text tokens' + 's'", False),
    ],
)
def test_what_counts_as_calculating_with_token_ids(line, calculates):
    assert bool(token_arithmetic(ast.parse(line))) == calculates


CONFIGS = sorted(p for p in (ROOT / "configs").rglob("*.py") if p.name != "__init__.py")


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: str(p.relative_to(ROOT)))
def test_every_parameter_of_every_config_says_where_it_lies(path):
    config = load_config(path)
    vocabulary = data_vocabulary(config.data)
    model = nnx.eval_shape(lambda: config.objective.build_model(config, vocabulary, nnx.Rngs(0)))
    parameters = nnx.to_flat_state(nnx.state(model, nnx.Param))
    assert parameters
    for where, variable in parameters:
        axes = variable.get_metadata()["logical_axes"]
        assert set(axes) <= {None, *RULES}, where
        stacked = bool({"layers", "encoder_layers"} & set(where))
        assert variable.get_value().ndim - len(axes) == stacked, where


def test_a_parameter_that_does_not_say_where_it_lies_is_refused():
    class Inner(nnx.Module):
        def __init__(self, weights):
            self.weights = weights

    class Model(nnx.Module):
        def __init__(self, weights):
            self.good = normal(nnx.Rngs(0), 1.0, (3, None), (4, "vocabulary"))
            self.inner = Inner(weights)

    mesh = make_mesh(devices=jax.devices()[:1])
    value = jnp.zeros((3, 4))
    for weights in (nnx.Param(value), nnx.Param(value, logical_axes=(None, None, None))):
        with pytest.raises(ValueError, match=r"inner.*weights of shape \(3, 4\) declares axes"):
            abstract_parameters(Model(weights), mesh)
    with pytest.raises(ValueError, match=r"shape \(3, 4\) declared with axes \('vocabulary',\)"):
        parameter(value, "vocabulary")
    shapes = abstract_parameters(Model(parameter(value, "stored_model", None)), mesh)
    assert shapes["inner"]["weights"].sharding.spec == P("fsdp", None)
