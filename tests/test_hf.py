"""Hugging Face checkpoints of three families against transformers' own models in torch."""

import dataclasses
import json
import shlex
from functools import partial

import jax
import numpy as np
import pytest
import torch
from conftest import ROOT, prefixmem, python_block
from flax import nnx
from models import make_run, whole_logits
from oracles import ORACLES, VOCABULARY, close, gemma3, llama, qwen3, save_oracle, torch_logits
from transformers import AutoModelForCausalLM, MistralConfig

from prefixmem_jax.config import Config
from prefixmem_jax.config_groups import DataConfig, InitConfig, MeshConfig, SyntheticConfig
from prefixmem_jax.convert import import_folder
from prefixmem_jax.data.batch import Batch
from prefixmem_jax.data.generation import generate
from prefixmem_jax.data.generator import GeneratorConfig
from prefixmem_jax.data.prepare import data_vocabulary
from prefixmem_jax.errors import UserError
from prefixmem_jax.hf.families import (
    decoder_config,
    differing_key,
    huggingface_config,
    read_folder,
)
from prefixmem_jax.hf.load import load_parts
from prefixmem_jax.hf.mapping import Architecture
from prefixmem_jax.hf.safetensors_files import SafetensorsFolder
from prefixmem_jax.layers.attention import Place
from prefixmem_jax.model_spec import ModelSpec
from prefixmem_jax.models.decoder import Decoder
from prefixmem_jax.objectives.classification import Classification
from prefixmem_jax.parallel.mesh import make_mesh
from prefixmem_jax.parallel.parameters import abstract_parameters
from prefixmem_jax.parallel.sharding import batch_sharding
from prefixmem_jax.runs.run import Run
from prefixmem_jax.sid_encoders.prefix_memory import PrefixMemoryConfig
from prefixmem_jax.training.initialise import initial_state
from prefixmem_jax.training.state import abstract_state
from prefixmem_jax.training.step import compile_train_step

# Others differ from these in counts of heads, and in what positions and windows are.
IN_BFLOAT16 = {
    "qwen3",
    "llama",
    "llama, llama3 rope, tied",
    "gemma3",
    "gemma3, odd heads, soft cap",
}
assert set(ORACLES) > IN_BFLOAT16


def some_devices(mesh_sizes):
    return make_mesh(MeshConfig(*mesh_sizes), jax.devices()[: int(np.prod(mesh_sizes))])


def load(folder, mesh_sizes=(1, 1, 1), **changes) -> Decoder:
    """A folder's decoder, loaded on a mesh and brought to one device."""
    described = read_folder(folder)
    config = dataclasses.replace(described.decoder, **changes)
    model = nnx.eval_shape(lambda: Decoder(config, described.vocabulary, rngs=nnx.Rngs(0)))
    abstract = abstract_parameters(model, some_devices(mesh_sizes))
    found = load_parts(SafetensorsFolder(folder), Architecture(config), {"llm": abstract})["llm"]
    where = jax.tree.map(lambda array, wanted: array.sharding == wanted.sharding, found, abstract)
    assert all(jax.tree.leaves(where))
    found = jax.device_put(jax.device_get(found), jax.devices()[0])
    return nnx.merge(nnx.split(model, nnx.Param)[0], nnx.State(found))


@jax.jit
def whole(decoder, tokens, place):
    hidden, kept = decoder(decoder.embed(tokens), place)
    return decoder.softmax_head().logits(hidden), kept


@jax.jit
def extended(decoder, tokens, cache, place, at):
    queries = jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, at, 1, axis=1), place)
    token = jax.lax.dynamic_slice_in_dim(tokens, at, 1, axis=1)
    hidden, cache = decoder.extend(decoder.embed(token), queries, cache, place, at)
    return decoder.softmax_head().logits(hidden)[:, 0], cache


@pytest.mark.parametrize("name", ORACLES)
def test_logits_equal_torch_in_prefill_and_cached_decode(name, tmp_path):
    oracle = save_oracle(tmp_path, name)
    tokens = np.random.default_rng(0).integers(0, VOCABULARY, (2, 40))
    expected = torch_logits(oracle, tokens)
    place = Place(np.tile(np.arange(40), (2, 1)), np.ones((2, 40), int))
    decoder = load(tmp_path)
    found, kept = whole(decoder, tokens, place)
    close(np.asarray(found), expected, 1e-4)
    start = 33
    cache = jax.tree.map(lambda x: x.at[:, :, start:].set(0), kept)
    for at in range(start, 40):
        found, cache = extended(decoder, tokens, cache, place, at)
        close(np.asarray(found), expected[:, at], 1e-4)
    if name not in IN_BFLOAT16:
        return
    # Of torch in bfloat16 against itself in float32.
    error = np.abs(torch_logits(oracle.to(torch.bfloat16), tokens) - expected).mean()
    ours, _ = whole(load(tmp_path, compute_dtype="bfloat16"), tokens, place)
    assert 0 < np.abs(np.asarray(ours) - expected).mean() < 1.5 * error


@pytest.mark.parametrize("mesh_sizes", [(1, 1, 1), (2, 2, 2)])
def test_sharded_files_load_into_sharded_arrays(mesh_sizes, tmp_path):
    """Bit for bit what one file gives on one device."""
    for folder, shard in (("one", "1GB"), ("several", "30KB")):
        save_oracle(tmp_path / folder, "qwen3, even", shard=shard)
    assert len(list((tmp_path / "one").glob("*.safetensors"))) == 1
    assert len(list((tmp_path / "several").glob("*.safetensors"))) > 3
    expected, found = load(tmp_path / "one"), load(tmp_path / "several", mesh_sizes)
    jax.tree.map(np.testing.assert_array_equal, nnx.state(found), nnx.state(expected))


def test_every_tensor_is_accounted_for(tmp_path):
    save_oracle(tmp_path, "qwen3", shard="30KB")
    index = tmp_path / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    files = content["weight_map"]
    files["model.layers.0.self_attn.extra.weight"] = files.pop("model.norm.weight")
    index.write_text(json.dumps(content))
    with pytest.raises(UserError) as error:
        load(tmp_path)
    assert "missing model.norm.weight" in str(error.value)
    assert "unexpected model.layers.0.self_attn.extra.weight" in str(error.value)
    with pytest.raises(UserError, match=r"q_proj.weight: shape \(96, 48\), expected \(80, 48\)"):
        save_oracle(tmp_path, "qwen3")
        index.unlink(missing_ok=True)
        load(tmp_path, query_heads=5)


@pytest.mark.parametrize("name", ORACLES)
def test_a_decoder_says_its_huggingface_config(name):
    config = ORACLES[name]
    decoder = decoder_config(config, name)
    back = huggingface_config(decoder, VOCABULARY, 256)
    assert back.model_type == config.model_type
    assert differing_key(decoder_config(back, name), decoder) is None
    with torch.device("meta"):
        oracles = [AutoModelForCausalLM.from_config(c) for c in (config, back)]
    shapes = [{k: v.shape for k, v in oracle.state_dict().items()} for oracle in oracles]
    assert shapes[0] == shapes[1]


def test_a_decoder_of_no_family_is_refused():
    decoder = dataclasses.replace(decoder_config(llama(), "here"), logit_softcap=3.0)
    with pytest.raises(UserError, match=r"model\.logit_softcap=3\.0: no Hugging Face architecture"):
        huggingface_config(decoder, VOCABULARY, 256)


def test_what_is_not_supported_is_named(tmp_path):
    for config, words in (
        (qwen3(attention_bias=True), "attention_bias=True is not supported"),
        (gemma3(attn_logit_softcapping=50.0), "attn_logit_softcapping=50.0 is not supported"),
        (llama(hidden_act="relu"), "activation 'relu' is not supported"),
        (MistralConfig(), "model_type 'mistral'; expected one of qwen3, llama, gemma3_text"),
        (
            llama(rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}),
            "rope_type 'dynamic' is not supported",
        ),
    ):
        with pytest.raises(UserError, match=words.replace("(", r"\(")):
            decoder_config(config, "here")
    with pytest.raises(UserError, match=r"no config\.json"):
        read_folder(tmp_path)


FRESH = ("sid_encoder", "memory")


def spec_for(folder, mesh_sizes=(1, 1, 1), **model_changes) -> ModelSpec:
    described = read_folder(folder)
    config = Config(
        "imported",
        data=DataConfig(
            codebook_sizes=(6, 8, 8),
            text_tokens=described.text_tokens,
            sequence_length=32,
            batch_size=4,
            vocabulary_multiple=2,
        ),
        model=dataclasses.replace(described.decoder, **model_changes),
        sid_encoder=PrefixMemoryConfig(target_levels=(2, 3), orders=2, heads=2, rows=300, d_mem=16),
    )
    return ModelSpec.create(config, data_vocabulary(config.data), some_devices(mesh_sizes))


@pytest.mark.parametrize("name", ["llama", "gemma3"])  # a head of its own, and a tied one
def test_a_run_starts_from_a_folder_with_sid_tokens_added(name, tmp_path):
    oracle = save_oracle(tmp_path, name)
    spec = spec_for(tmp_path)
    options = InitConfig(from_huggingface=str(tmp_path), fresh=FRESH)
    state = initial_state(spec, options, seed=3)
    llm = jax.device_get(state.params["llm"])
    added = llm["embedding"][VOCABULARY:]
    assert added.shape == (2 + 6 + 8 + 8, 48)
    mean, spread = llm["embedding"][:VOCABULARY].mean(axis=0), llm["embedding"].std(axis=0)
    assert np.abs(added - mean).mean() < 0.2 * spread.mean()
    assert len(np.unique(added, axis=0)) == len(added)
    tokens = np.random.default_rng(0).integers(0, VOCABULARY, (2, 9))
    params, memory = jax.device_put(jax.device_get((state.params, state.memory)), jax.devices()[0])
    logits = whole_logits(spec.model(params), partial(spec.table.gather, memory), tokens)
    close(logits[..., :VOCABULARY], torch_logits(oracle, tokens), 1e-4)
    if name == "gemma3":  # test_the_documented_config_trains has an untied one
        state, metrics = compile_train_step(spec)(state, sid_batch(spec))
        assert np.isfinite(metrics["loss"])


def test_a_memory_that_was_trained_alone_goes_under_an_llm(tmp_path):
    """The paper's two stages: tables from a run of stage 1, the rest from a folder, W_out fresh."""
    save_oracle(tmp_path / "hf", "llama")
    spec = spec_for(tmp_path / "hf")
    synthetic = SyntheticConfig(items=90, users=20, codebook_sizes=(6, 8, 8), children=(4, 5, 5))
    data = dataclasses.replace(spec.config.data, synthetic=synthetic)
    stage_1 = make_run(
        tmp_path / "stage1",
        dataclasses.replace(spec.config, data=data, objective=Classification(softmax="sids")),
    )
    options = InitConfig(
        from_huggingface=str(tmp_path / "hf"),
        run=str(stage_1.path),
        take=("memory",),
        fresh=("sid_encoder",),
    )
    state = initial_state(spec, options, seed=3)
    alone = initial_state(
        spec, InitConfig(from_huggingface=str(tmp_path / "hf"), fresh=FRESH), seed=3
    )
    rows = stage_1.load(stage_1.spec(jax.devices()[:1]), ["memory"])["memory"]["rows"]
    np.testing.assert_array_equal(state.memory, rows)
    assert np.abs(np.asarray(state.memory) - np.asarray(alone.memory)).max() > 0.1
    jax.tree.map(np.testing.assert_array_equal, state.params, alone.params)


def sid_batch(spec) -> Batch:
    """Items one after the other, as in training."""
    vocabulary, batch = spec.vocabulary, Batch.zeros(4, 32)
    codes = np.random.default_rng(0).integers(0, 6, (4, 10, 3))
    batch.tokens[:, 0] = vocabulary.bos_token
    batch.tokens[:, 1:31] = vocabulary.encode(codes).reshape(4, 30)
    batch.segment_ids[:] = batch.loss_mask[:] = 1
    batch.positions[:] = np.arange(32)
    return jax.device_put(batch, batch_sharding(spec.mesh))


def import_by_command(folder, out):
    prefixmem("import", folder, "--out", out)


@pytest.mark.parametrize(
    ("name", "mesh_sizes", "importing"),
    [
        ("qwen3, even", (2, 2, 2), import_by_command),
        ("llama, llama3 rope, tied", (2, 4, 1), import_folder),
    ],
)
def test_an_imported_checkpoint_is_the_folder_on_any_mesh(name, mesh_sizes, importing, tmp_path):
    """And the SID tokens that are added are the same ones."""
    save_oracle(tmp_path / "hf", name)
    importing(tmp_path / "hf", tmp_path / "ckpt")
    parts = []
    for folder, sizes in (("hf", (1, 1, 1)), ("ckpt", (1, 1, 1)), ("ckpt", mesh_sizes)):
        options = InitConfig(from_huggingface=str(tmp_path / folder), fresh=FRESH)
        spec = spec_for(tmp_path / "hf", sizes)
        state = initial_state(spec, options, seed=3)
        wanted = jax.tree.map(lambda leaf: leaf.sharding, abstract_state(spec))
        assert all(jax.tree.leaves(jax.tree.map(lambda x, s: x.sharding == s, state, wanted)))
        parts.append(jax.device_get(state.params["llm"]))
    for other in parts[1:]:
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-7), other, parts[0]
        )


def test_sid_tokens_start_from_code_centroids(tmp_path):
    """Codes whose centroids are near start near, and all around the vocabulary's mean."""
    save_oracle(tmp_path / "hf", "llama")
    spec = spec_for(tmp_path / "hf")
    rng = np.random.default_rng(0)
    codebooks = {f"level_{n}": rng.normal(size=(k, 32)) / n for n, k in ((1, 6), (2, 8), (3, 8))}
    codebooks["level_2"][5] = codebooks["level_2"][4] + 0.01
    np.savez(tmp_path / "codebooks.npz", **codebooks)
    options = InitConfig(
        from_huggingface=str(tmp_path / "hf"),
        fresh=FRESH,
        codebooks=str(tmp_path / "codebooks.npz"),
    )
    llm = jax.device_get(initial_state(spec, options, seed=0).params["llm"])
    for table in (llm["embedding"], llm["head"].T):
        known = table[:VOCABULARY]
        start, stop = spec.vocabulary.token_range(2)
        level = (table[start:stop] - known.mean(axis=0)) / known.std(axis=0)
        assert 0.05 < level.std() < 0.2
        distances = np.linalg.norm(level[:, None] - level[None], axis=-1)
        true = codebooks["level_2"]
        expected = np.linalg.norm(true[:, None] - true[None], axis=-1)
        upper = np.triu_indices(8, 1)
        assert np.corrcoef(distances[upper], expected[upper])[0, 1] > 0.7
        assert distances[4, 5] < 0.05 * np.median(distances[upper])
    for content, words in (
        ({"level_1": codebooks["level_1"]}, "no array level_2; it has level_1"),
        ({**codebooks, "level_3": np.zeros((4, 32))}, r"level_3 has shape \(4, 32\), expected"),
    ):
        np.savez(tmp_path / "codebooks.npz", **content)
        with pytest.raises(UserError, match=words):
            initial_state(spec, options, seed=0)
    (tmp_path / "codebooks.npz").write_text("no zip")
    with pytest.raises(UserError, match=r"not an \.npz file"):
        initial_state(spec, options, seed=0)


def test_a_folder_that_does_not_fit_the_config_is_refused(tmp_path):
    save_oracle(tmp_path, "llama")
    folder = str(tmp_path)
    for spec, options, words in (
        (
            spec_for(tmp_path, d_ff=96),
            InitConfig(from_huggingface=folder, fresh=FRESH),
            "its d_ff is 72, model.d_ff is 96",
        ),
        (
            spec_for(tmp_path),
            InitConfig(from_huggingface=folder, fresh=("llm", *FRESH)),
            "part 'llm' comes from there; this run has none, or names it too",
        ),
        (
            spec_for(tmp_path),
            InitConfig(from_huggingface=folder),
            "has no part 'sid_encoder'; name it in init.take or init.fresh",
        ),
    ):
        with pytest.raises(UserError, match=words):
            initial_state(spec, options, seed=0)


def test_malformed_files_are_named(tmp_path):
    (tmp_path / "model.safetensors.index.json").write_text("{oops")
    with pytest.raises(UserError, match=r"index\.json: expected JSON with a weight_map"):
        SafetensorsFolder(tmp_path)
    (tmp_path / "part.safetensors").write_text("garbage")
    (tmp_path / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"a": "part.safetensors"}})
    )
    with pytest.raises(UserError, match=r"part\.safetensors: not a safetensors file"):
        SafetensorsFolder(tmp_path)


def test_the_documented_config_trains(tmp_path):
    """docs/huggingface.md, as written but for the folders and sizes."""
    save_oracle(tmp_path / "model", "qwen3")
    text = python_block((ROOT / "docs" / "huggingface.md").read_text(), "read_folder")
    text = text.replace("FOLDER", str(tmp_path / "model")).replace('path="DATA", ', "")
    (tmp_path / "mine.py").write_text(text)
    small = (
        "sid_encoder.target_levels=(3,4)", "sid_encoder.orders=3", "sid_encoder.rows=64", "sid_encoder.d_mem=16",
        "data.sequence_length=32", "data.batch_size=4", "data.synthetic.users=50", "steps=2",
        "data.synthetic.items=200", "evaluation.validation_examples=8", "mesh.fsdp=1",
    )  # fmt: skip
    prefixmem("train", tmp_path / "mine.py", "--out", tmp_path / "run", *small)
    assert (tmp_path / "run" / "checkpoints" / "2").is_dir()


def test_the_documented_stages_train(tmp_path):
    """docs/huggingface.md's two commands, as written but for folders and sizes."""
    save_oracle(tmp_path / "model", "qwen3")
    generate(
        GeneratorConfig(
            users=60,
            codebook_sizes=(8, 4, 4, 8, 8),
            children=(4, 2, 2, 4, 4),
            groups=2,
            mean_length=5,
        ),
        tmp_path / "data",
    )
    text = (ROOT / "docs" / "huggingface.md").read_text().replace("\\\n", "")
    commands = [
        line.split("prefixmem ", 1)[1]
        for line in text.splitlines()
        if "    prefixmem train qwen3_1p7b" in line
    ]
    assert len(commands) == 2
    shape = dataclasses.asdict(read_folder(tmp_path / "model").decoder)
    small = [
        *(f"model.{key}={value}" for key, value in shape.items() if key not in ("compute_dtype", "remat")),
        f"data.text_tokens={VOCABULARY}", "data.vocabulary_multiple=1", "data.codebook_sizes=none",
        "data.sequence_length=32", "data.batch_size=4", "evaluation.validation_examples=8", "mesh.fsdp=1",
        "sid_encoder.rows=64", "sid_encoder.d_mem=16", "steps=2", "optimizer.warmup_steps=0",
    ]  # fmt: skip
    for command in commands:
        for written, here in (
            ("/models/Qwen3-1.7B", "model"), ("runs/", "runs-"), ("DATA", "data"),
        ):  # fmt: skip
            command = command.replace(written, f"{tmp_path}/{here}")
        last = ["optimizer.learning_rate=1e-9"] if "stage2" in command else []
        prefixmem(*shlex.split(command), *small, *last)
    first, second = (Run(tmp_path / f"runs-stage{n}") for n in (1, 2))
    assert set(first.spec().parts) == {"sid_encoder", "head", "memory"}
    memories = [run.load(run.spec(), ("memory",))["memory"]["rows"] for run in (first, second)]
    np.testing.assert_allclose(*memories, atol=1e-6)  # stage 1 moved them by 1e-3
    llm = second.load(second.spec(), ("llm",))["llm"]
    np.testing.assert_allclose(
        llm["final_norm"]["scale"], load(tmp_path / "model").final_norm.scale[...], atol=1e-6
    )
