"""The engine: the same on any number of devices, from a checkpoint and a catalogue alone."""

import dataclasses
import json
import shutil
from pathlib import Path

import engine_memory
import forked
import jax
import numpy as np
import pytest
from conftest import command_environment
from models import SID_ENCODER, make_run, small_config
from scipy import sparse

from prefixmem_jax.config_files import to_json
from prefixmem_jax.config_groups import DecoderConfig, EvaluationConfig, ItemHeadConfig
from prefixmem_jax.convert import export_run
from prefixmem_jax.data.formats.parquet import write_dataset
from prefixmem_jax.data.prepare import data_vocabulary, prepare_data
from prefixmem_jax.data.transitions import Transitions
from prefixmem_jax.errors import UserError
from prefixmem_jax.inference import engine as engine_module
from prefixmem_jax.inference.engine import seen_groups
from prefixmem_jax.inference.programs import run_on_all_devices, trace_search
from prefixmem_jax.model_spec import ModelSpec
from prefixmem_jax.objectives.next_token import NextToken
from prefixmem_jax.parallel.mesh import make_mesh
from prefixmem_jax.recommender import recommend
from prefixmem_jax.runs.run import TRANSITIONS, Run
from prefixmem_jax.semantic_ids.catalog import Catalog

CONFIG = small_config(DecoderConfig(layers=1), 0, evaluation=EvaluationConfig(batch_size=8))


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Run:
    """Not to be written to."""
    return make_run(tmp_path_factory.mktemp("engine") / "run", CONFIG)


@pytest.fixture(scope="module")
def engines(run):
    """By number of devices."""
    return {count: run.engine(devices=jax.devices()[:count]) for count in (1, 8)}


@pytest.fixture(scope="module")
def histories(run) -> list[np.ndarray]:
    """Of 11 users: no multiple of the devices, a full batch and a part of one, one empty."""
    found = run.data().split.test.take(np.arange(10)).histories()
    found.insert(3, np.array([], np.int64))
    assert max(map(len, found)) > CONFIG.data.max_items  # one is cut
    return found


def test_a_search_is_the_same_program_however_its_layers_were_trained():
    """In a loop, which compiles sooner."""
    programs = []
    for scan_layers in (True, False):
        config = small_config(DecoderConfig(layers=5, scan_layers=scan_layers), 0)
        spec = ModelSpec.create(config, data_vocabulary(config.data), make_mesh())
        programs.append(trace_search(spec)[0].jaxpr)
    looped, also_looped = map(str, programs)
    assert "length=5" in looped
    assert also_looped == looped


def same(ours, theirs):
    np.testing.assert_array_equal(ours[0], theirs[0])
    np.testing.assert_allclose(ours[1], theirs[1], rtol=1e-5, atol=1e-5)


def test_each_device_holds_a_part_of_the_rows_and_all_parameters(engines):
    for count, engine in engines.items():
        rows, width = engine.memory.shape
        parts = [shard.data for shard in engine.memory.addressable_shards]
        assert [part.shape for part in parts] == [(rows // count, width)] * count
        np.testing.assert_array_equal(np.concatenate(parts), engines[1].memory)
        for leaf in jax.tree.leaves(engine.params):
            assert len(leaf.addressable_shards) == count and leaf.is_fully_replicated


def test_what_is_computed_in_bfloat16_is_held_in_bfloat16(tmp_path, histories):
    """Cast once, where it would be cast at every call: not a bit is other than before."""
    model = dataclasses.replace(CONFIG.model, compute_dtype="bfloat16")
    config = dataclasses.replace(CONFIG, model=model, item_head=ItemHeadConfig("own"))
    run = make_run(tmp_path / "run", config)
    engine = run.engine(devices=jax.devices()[:2])
    found = engine.search(histories, 5, constrained=True)
    dtypes = {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf.dtype.name
        for path, leaf in jax.tree_util.tree_leaves_with_path(engine.params)
    }
    assert dtypes["llm/layers/query"] == dtypes["item_head/vectors"] == "bfloat16"
    assert dtypes["llm/final_norm/scale"] == dtypes["sid_encoder/projection"] == "float32"
    whole = run.load(engine.spec, engine.spec.params)
    everywhere = jax.tree.map(lambda leaf: leaf.sharding, engine.params)
    engine.use(jax.device_put(whole, everywhere), engine.memory)
    assert engine.params["llm"]["layers"]["query"].dtype == "float32"
    again = engine.search(histories, 5, constrained=True)
    np.testing.assert_array_equal(found[0], again[0])
    np.testing.assert_array_equal(found[1], again[1])


def test_any_number_of_devices_finds_the_same(engines, histories):
    found = {
        count: engine.search(histories, 5, constrained=True, exclude_seen=True)
        for count, engine in engines.items()
    }
    assert np.isfinite(found[1][1]).all() and len(np.unique(found[1][0], axis=0)) > 5
    same(found[8], found[1])


def test_without_sid_encoder_and_trie_too(tmp_path, histories):
    run = make_run(tmp_path / "run", dataclasses.replace(CONFIG, sid_encoder=None))
    alone, together = (run.engine(devices=jax.devices()[:count]) for count in (1, 8))
    assert alone.memory is None and together.memory is None
    same(*(engine.search(histories, 5, constrained=False) for engine in (together, alone)))


def test_where_sids_alone_are_predicted_they_are_ranked_alone(run, histories, tmp_path):
    """Among those of the same parameters; lists are the same, which compare codes of a level."""
    config = dataclasses.replace(run.config, objective=NextToken(softmax="sids"))
    alone = shutil.copytree(run.path, tmp_path / "run")
    (alone / "config.json").write_text(to_json(config))
    targets = run.data().split.test.targets[:11]
    engines = [Run(path).engine(devices=jax.devices()[:1]) for path in (run.path, alone)]
    whole, sids = (engine.target_ranks(histories, targets) for engine in engines)
    assert (sids <= whole).all() and (sids < whole).any()
    assert sids.max() <= sum(run.vocabulary.space.codebook_sizes)
    same(*(engine.search(histories, 5, constrained=False) for engine in engines))


def test_any_number_of_devices_ranks_and_writes_the_same(engines, histories, run):
    alone, together = engines[1], engines[8]
    targets = run.data().split.test.targets[:11]
    ranks = [engine.target_ranks(histories, targets) for engine in (together, alone)]
    np.testing.assert_array_equal(*ranks)
    assert ranks[0].min() >= 1 and len(np.unique(ranks[0])) > 5
    written = [engine.describe_items(range(9), 6) for engine in (together, alone)]
    np.testing.assert_array_equal(*written)
    assert written[0].shape == (9, 6) and len(np.unique(written[0])) > 1


def test_the_search_that_is_planned_is_the_one_that_runs(tmp_path, monkeypatch):
    """With all that a search can have; of the trie, the plan's is the largest there can be."""
    config = dataclasses.replace(
        CONFIG,
        sid_encoder=dataclasses.replace(SID_ENCODER, target_levels=(1, 3, 4), orders=4),
        item_head=ItemHeadConfig("memory"),
        evaluation=EvaluationConfig(batch_size=7, beam=5, transition_share=0.1),
    )
    run = make_run(tmp_path, config)
    items = config.data.synthetic.items
    near = sparse.csr_array(np.random.default_rng(0).random((items, items)))
    Transitions(near, 0.5, 0.0).save(run.path / TRANSITIONS)
    engine = run.engine()
    seen = {}

    def noting(program, *operands):
        if not seen:
            seen.update(shapes=jax.tree.map(lambda x: (x.shape, x.dtype), operands))
        return run_on_all_devices(program, *operands)

    engine._items_read()
    monkeypatch.setattr(engine_module, "run_on_all_devices", noting)
    most = config.data.max_items
    histories = [x[:most] for x in run.data().split.test.take(np.arange(8)).histories()]
    engine.search(histories, 5, constrained=True, exclude_seen=True)
    traced, users = trace_search(engine.spec)
    assert users == 8  # a multiple of the devices
    planned = jax.tree.map(lambda info: (info.shape, info.dtype), traced.args_info[0])
    *planned, (shared,), by_user = planned
    *ran, (used,), used_by_user = seen["shapes"]
    assert planned == ran and by_user == used_by_user
    assert shared._replace(trie=None) == used._replace(trie=None)
    for largest, level in zip(shared.trie, used.trie, strict=True):
        assert largest.widest >= level.widest
        for name in ("first_child", "code"):
            (size, dtype), (used_size, used_dtype) = getattr(largest, name), getattr(level, name)
            assert size >= used_size and dtype == used_dtype


def test_seen_items_are_left_out(engines):
    engine = engines[1]
    catalog = engine.catalog
    everything = recommend(engine, [5, 9], 400, exclude_seen=False)
    assert sorted(r.item for r in everything) == list(range(len(catalog)))
    seen = [everything[0].item, everything[3].item]
    kept = [r.item for r in recommend(engine, seen, 400)]
    assert sorted([*kept, *seen]) == list(range(len(catalog)))
    # A SID that a seen item shares with another stays.
    sids = np.array([[1, 0, 0, 0], [2, 1, 0, 0], [1, 0, 0, 0]])
    shared = Catalog(sids, [None] * 3, catalog.space)
    assert seen_groups(shared, [[0], [0, 1], [2, 0, 0]], 1).tolist() == [[-1], [1], [0]]


def test_a_checkpoint_and_an_exported_catalogue_are_enough(tmp_path):
    """The data is gone; so is all that only training needs."""
    write_dataset(tmp_path / "data", prepare_data(CONFIG.data).dataset)
    data = dataclasses.replace(CONFIG.data, path=str(tmp_path / "data"))
    run = make_run(tmp_path / "run", dataclasses.replace(CONFIG, data=data))
    device = jax.devices()[:1]
    expected = recommend(run.engine(devices=device), [3, 14, 15], 5)
    export_run(run, tmp_path / "out")
    shutil.rmtree(tmp_path / "data")
    for part in ("optimizer", "memory_optimizer"):
        shutil.rmtree(tmp_path / "run" / "checkpoints" / "0" / part)

    run, items = Run(tmp_path / "run"), tmp_path / "out" / "items.jsonl"
    catalog = Catalog.read_jsonl(items, run.data_description.codebook_sizes)
    assert recommend(run.engine(catalog, device), [3, 14, 15], 5) == expected
    lines = items.read_text().splitlines()
    entry = json.loads(lines[7])
    entry["sid"][-1] ^= 1
    items.write_text("\n".join([*lines[:7], json.dumps(entry), *lines[8:]]))
    other = Catalog.read_jsonl(items, run.data_description.codebook_sizes)
    for catalog, words in ((other, "was trained with another catalogue"), (None, "data")):
        with pytest.raises(UserError, match=words) as error:
            run.engine(catalog, device)
        assert "\n" not in str(error.value) and str(tmp_path) in str(error.value)


def test_opening_a_run_takes_little_more_memory_than_it_keeps(tmp_path):
    """The rows are much the largest array; they must not be in memory twice."""
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("needs Linux's /proc")

    def in_its_own_process(function, *arguments) -> str:
        done = forked.run(function, arguments, command_environment(), timeout=300)
        assert done.returncode == 0, done.stderr
        return done.stdout

    for name, size in (("small", 2 << 20), ("large", 400 << 20)):
        in_its_own_process(engine_memory.build, tmp_path / name, size)
    said = in_its_own_process(engine_memory.measure_second, tmp_path / "small", tmp_path / "large")
    arrays, peak = map(int, said.split())
    assert arrays > 400 << 20
    assert peak < 1.25 * arrays
