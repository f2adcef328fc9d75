"""Hugging Face checkpoints of three families against transformers' own models in torch."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from conftest import ROOT, prefixmem
from flax import nnx
from jax.sharding import NamedSharding
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from prefixmem_jax.config import Config, DataConfig, InitConfig, MeshConfig, PrefixMemoryConfig
from prefixmem_jax.data.prepare import data_space
from prefixmem_jax.errors import UserError
from prefixmem_jax.hf.families import (
    decoder_config,
    differing_key,
    huggingface_config,
    read_folder,
)
from prefixmem_jax.hf.load import load_parts
from prefixmem_jax.hf.safetensors_files import SafetensorsFolder
from prefixmem_jax.models.decoder import Cache, Decoder, causal_mask
from prefixmem_jax.parallel.mesh import make_mesh
from prefixmem_jax.parallel.sharding import batch_sharding, parameter_spec
from prefixmem_jax.training.initialise import initial_state
from prefixmem_jax.training.step import Trainer

VOCABULARY = 64
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 48,
    "intermediate_size": 72,
    "initializer_range": 0.2,
    "max_position_embeddings": 256,
}
LLAMA3_ROPE = {
    "rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0,
    "high_freq_factor": 4.0, "original_max_position_embeddings": 32,
}  # fmt: skip
GEMMA_ROPE = {
    "sliding_attention": {"rope_type": "default", "rope_theta": 1e3},
    "full_attention": {"rope_type": "linear", "rope_theta": 1e5, "factor": 4.0},
}
PATTERN = ["sliding_attention", "sliding_attention", "full_attention"]


def qwen3(heads=6, kv=3, head_dim=16, tied=False, **more):
    return Qwen3ForCausalLM, Qwen3Config(
        **SIZES, num_hidden_layers=3, num_attention_heads=heads, num_key_value_heads=kv,
        head_dim=head_dim, tie_word_embeddings=tied, **more,
    )  # fmt: skip


def llama(heads=6, kv=3, head_dim=8, tied=False, **more):
    return LlamaForCausalLM, LlamaConfig(
        **SIZES, num_hidden_layers=3, num_attention_heads=heads, num_key_value_heads=kv,
        head_dim=head_dim, tie_word_embeddings=tied, **more,
    )  # fmt: skip


def gemma3(heads=4, kv=1, head_dim=16, window=5, layers=4, **more):
    pattern = [PATTERN[n % 3] for n in range(layers)]
    return Gemma3ForCausalLM, Gemma3TextConfig(
        **SIZES, num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=kv,
        head_dim=head_dim, sliding_window=window, layer_types=pattern, query_pre_attn_scalar=20,
        rope_parameters=GEMMA_ROPE, **more,
    )  # fmt: skip


MODELS = {
    "qwen3": qwen3(),
    "qwen3, even": qwen3(heads=4, kv=2),
    "qwen3, 5 query heads, tied": qwen3(heads=5, kv=1, tied=True),
    "qwen3, sliding": qwen3(
        use_sliding_window=True, sliding_window=4, layer_types=PATTERN
    ),
    "llama": llama(),
    "llama, llama3 rope, tied": llama(tied=True, rope_parameters=LLAMA3_ROPE),
    "llama, one kv head, no head_dim": llama(
        heads=3, kv=1, head_dim=None,
        rope_parameters={"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0},
    ),
    "gemma3": gemma3(),
    "gemma3, odd heads, soft cap": gemma3(heads=3, kv=3, window=3, final_logit_softcapping=3.0),
}  # fmt: skip


def save_oracle(folder, name, shard="1GB"):
    """A random model of transformers' own class, saved as its users would find it."""
    kind, config = MODELS[name]
    torch.manual_seed(0)
    oracle = kind(config).eval()
    with torch.no_grad():
        for parameter_name, parameter in oracle.named_parameters():
            if "norm" in parameter_name:  # or a norm that is skipped would go unseen
                parameter.uniform_(-0.5, 0.5) if "gemma" in name else parameter.uniform_(0.5, 1.5)
    oracle.save_pretrained(folder, max_shard_size=shard)
    return oracle


def load(folder, mesh_sizes=(1, 1, 1), **changes) -> Decoder:
    described = read_folder(folder)
    config, vocabulary = dataclasses.replace(described.decoder, **changes), described.vocabulary
    mesh = make_mesh(MeshConfig(*mesh_sizes), jax.devices()[: int(np.prod(mesh_sizes))])
    model = nnx.eval_shape(lambda: Decoder(config, vocabulary, rngs=nnx.Rngs(0)))
    graphdef, params = nnx.split(model, nnx.Param)
    abstract = jax.tree_util.tree_map_with_path(
        lambda path, leaf: jax.ShapeDtypeStruct(
            leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, parameter_spec(path, leaf.shape))
        ),
        nnx.to_pure_dict(params),
    )
    found = load_parts(SafetensorsFolder(folder), config, None, {"llm": abstract})["llm"]
    placed = jax.tree.map(lambda array, wanted: array.sharding == wanted.sharding, found, abstract)
    assert all(jax.tree.leaves(placed))
    found = jax.device_put(jax.device_get(found), jax.devices()[0])
    return nnx.merge(graphdef, nnx.State(found))


def whole(decoder, tokens):
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    mask = causal_mask(jnp.ones_like(positions))
    hidden, cache = decoder(decoder.embed(jnp.asarray(tokens)), positions, mask)
    return np.asarray(decoder.logits(hidden)), cache


def close(found, expected, tolerance):
    assert np.abs(found - expected).max() <= tolerance * np.abs(expected).max()


@pytest.mark.parametrize("name", MODELS)
def test_logits_equal_torch_in_prefill_and_cached_decode(name, tmp_path):
    oracle = save_oracle(tmp_path, name)
    tokens = np.random.default_rng(0).integers(0, VOCABULARY, (2, 40))
    with torch.no_grad():
        expected = oracle(torch.tensor(tokens)).logits.numpy()
    decoder = load(tmp_path)
    found, _ = whole(decoder, tokens)
    close(found, expected, 1e-4)
    start = 33
    _, cache = whole(decoder, tokens[:, :start])
    cache = Cache(*(jnp.pad(x, ((0, 0), (0, 0), (0, 7), (0, 0), (0, 0))) for x in cache))
    keys = jnp.broadcast_to(jnp.arange(40), (2, 40))
    for at in range(start, 40):
        x = decoder.embed(jnp.asarray(tokens[:, at : at + 1]))
        mask = (keys <= at)[:, None]
        hidden, cache = decoder(x, jnp.full((2, 1), at), mask, cache, at, keys)
        close(np.asarray(decoder.logits(hidden))[:, 0], expected[:, at], 1e-4)
    with torch.no_grad():
        rough = oracle.to(torch.bfloat16)(torch.tensor(tokens)).logits.float().numpy()
    ours, _ = whole(load(tmp_path, compute_dtype="bfloat16"), tokens)
    error = np.abs(rough - expected).mean()  # of torch in bfloat16 against itself in float32
    assert 0 < np.abs(ours - expected).mean() < 1.5 * error


@pytest.mark.parametrize("mesh_sizes", [(1, 1, 1), (2, 2, 2)])
def test_sharded_files_load_into_sharded_arrays(mesh_sizes, tmp_path):
    oracle = save_oracle(tmp_path, "qwen3, even", shard="30KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 3
    tokens = np.random.default_rng(0).integers(0, VOCABULARY, (1, 9))
    with torch.no_grad():
        expected = oracle(torch.tensor(tokens)).logits.numpy()
    found, _ = whole(load(tmp_path, mesh_sizes), tokens)
    close(found, expected, 1e-4)


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


@pytest.mark.parametrize("name", MODELS)
def test_a_decoder_says_its_huggingface_config(name):
    kind, config = MODELS[name]
    decoder = decoder_config(config, name)
    back = huggingface_config(decoder, VOCABULARY, 256)
    assert back.model_type == config.model_type
    assert differing_key(decoder_config(back, name), decoder) is None
    with torch.device("meta"):
        shapes = [{k: v.shape for k, v in kind(c).state_dict().items()} for c in (config, back)]
    assert shapes[0] == shapes[1]


def test_a_decoder_of_no_family_is_refused():
    decoder = dataclasses.replace(decoder_config(llama()[1], "here"), logit_softcap=3.0)
    with pytest.raises(UserError, match=r"model\.logit_softcap=3\.0: no Hugging Face architecture"):
        huggingface_config(decoder, VOCABULARY, 256)


def test_what_is_not_supported_is_named(tmp_path):
    for config, words in (
        (qwen3(attention_bias=True)[1], "attention_bias=True is not supported"),
        (gemma3(attn_logit_softcapping=50.0)[1], "attn_logit_softcapping=50.0 is not supported"),
        (llama(hidden_act="relu")[1], "activation 'relu' is not supported"),
        (MistralConfig(), "model_type 'mistral'; expected one of qwen3, llama, gemma3_text"),
        (
            llama(rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0})[1],
            "rope_type 'dynamic' is not supported",
        ),
    ):
        with pytest.raises(UserError, match=words.replace("(", r"\(")):
            decoder_config(config, "here")
    with pytest.raises(UserError, match=r"no config\.json"):
        read_folder(tmp_path)


def trainer_for(folder, mesh_sizes=(1, 1, 1), **model_changes) -> Trainer:
    described = read_folder(folder)
    model, vocabulary = described.decoder, described.text_tokens
    config = Config(
        "imported",
        data=DataConfig(
            codebook_sizes=(6, 8, 8),
            text_tokens=vocabulary,
            sequence_length=32,
            batch_size=4,
            vocabulary_multiple=2,
        ),
        model=dataclasses.replace(model, **model_changes),
        encoder=PrefixMemoryConfig(target_levels=(2, 3), orders=2, heads=2, rows=300, d_mem=16),
    )
    mesh = make_mesh(MeshConfig(*mesh_sizes), jax.devices()[: int(np.prod(mesh_sizes))])
    return Trainer.create(config, data_space(config.data), mesh)


@pytest.mark.parametrize("name", ["llama", "gemma3"])  # a head of its own, and a tied one
def test_a_run_starts_from_a_folder_with_sid_tokens_added(name, tmp_path):
    oracle = save_oracle(tmp_path, name)
    trainer = trainer_for(tmp_path)
    options = InitConfig(from_huggingface=str(tmp_path), fresh=("encoder", "memory"))
    state = initial_state(trainer, options, seed=3)
    llm = jax.device_get(state.params["llm"])
    added = llm["embedding"][VOCABULARY:]
    assert added.shape == (2 + 6 + 8 + 8, 48)
    mean, spread = llm["embedding"][:VOCABULARY].mean(axis=0), llm["embedding"].std(axis=0)
    assert np.abs(added - mean).mean() < 0.2 * spread.mean()
    assert len(np.unique(added, axis=0)) == len(added)
    plain = jax.device_put(jax.device_get(state), jax.devices()[0])
    tokens = np.random.default_rng(0).integers(0, VOCABULARY, (2, 9))
    with torch.no_grad():
        expected = oracle(torch.tensor(tokens)).logits.numpy()
    model = trainer.model(plain.params)
    positions = jnp.broadcast_to(jnp.arange(9), tokens.shape)
    rows = trainer.table.lookup(
        plain.memory, model.encoder.addresses(jnp.asarray(tokens), jnp.ones_like(positions))
    )
    logits = model.next_token_logits(jnp.asarray(tokens), jnp.ones_like(positions), positions, rows)
    close(np.asarray(logits)[..., :VOCABULARY], expected, 1e-4)
    state, metrics = trainer.compile_train_step()(state, sid_batch(trainer))
    assert np.isfinite(metrics["loss"])


@pytest.mark.parametrize(
    ("name", "mesh_sizes"),
    [("qwen3, even", (2, 2, 2)), ("llama, llama3 rope, tied", (2, 4, 1))],
)
def test_an_imported_checkpoint_is_the_folder_on_any_mesh(name, mesh_sizes, tmp_path):
    """And the SID tokens that are added are the same ones."""
    save_oracle(tmp_path / "hf", name)
    prefixmem("import", tmp_path / "hf", "--out", tmp_path / "ckpt")
    states = []
    for folder, sizes in (("hf", (1, 1, 1)), ("ckpt", (1, 1, 1)), ("ckpt", mesh_sizes)):
        options = InitConfig(from_huggingface=str(tmp_path / folder), fresh=("encoder", "memory"))
        trainer = trainer_for(tmp_path / "hf", sizes)
        state = initial_state(trainer, options, seed=3)
        wanted = jax.tree.map(lambda leaf: leaf.sharding, trainer.abstract_state())
        assert all(jax.tree.leaves(jax.tree.map(lambda x, s: x.sharding == s, state, wanted)))
        states.append(jax.device_get(state.params["llm"]))
    for other in states[1:]:
        for path, leaf in jax.tree_util.tree_leaves_with_path(states[0]):
            found = other
            for key in path:
                found = found[key.key]
            np.testing.assert_allclose(found, leaf, rtol=0, atol=1e-7)


def test_sid_tokens_start_from_code_centroids(tmp_path):
    """Codes whose centroids are near start near, and all around the vocabulary's mean."""
    save_oracle(tmp_path / "hf", "llama")
    trainer = trainer_for(tmp_path / "hf")
    rng = np.random.default_rng(0)
    codebooks = {f"level_{n}": rng.normal(size=(k, 32)) / n for n, k in ((1, 6), (2, 8), (3, 8))}
    codebooks["level_2"][5] = codebooks["level_2"][4] + 0.01
    np.savez(tmp_path / "codebooks.npz", **codebooks)
    options = InitConfig(
        from_huggingface=str(tmp_path / "hf"),
        fresh=("encoder", "memory"),
        codebooks=str(tmp_path / "codebooks.npz"),
    )
    llm = jax.device_get(initial_state(trainer, options, seed=0).params["llm"])
    for table in (llm["embedding"], llm["head"].T):
        known = table[:VOCABULARY]
        start, stop = trainer.space.token_range(2)
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
            initial_state(trainer, options, seed=0)
    (tmp_path / "codebooks.npz").write_text("no zip")
    with pytest.raises(UserError, match=r"not an \.npz file"):
        initial_state(trainer, options, seed=0)


def sid_batch(trainer):
    """Items one after the other, as in training."""
    space, shape = trainer.space, (4, 32)
    codes = np.random.default_rng(0).integers(0, 6, (4, 10, 3))
    tokens = np.zeros(shape, np.int32)
    tokens[:, 0] = space.bos_token
    tokens[:, 1:31] = space.encode(codes).reshape(4, 30)
    ones = np.ones(shape, np.int32)
    batch = {
        "tokens": tokens,
        "segment_ids": ones,
        "positions": np.tile(np.arange(32, dtype=np.int32), (4, 1)),
        "loss_mask": ones.astype(np.float32),
    }
    return jax.device_put(batch, batch_sharding(trainer.mesh))


def test_a_folder_that_does_not_fit_the_config_is_refused(tmp_path):
    save_oracle(tmp_path, "llama")
    folder = str(tmp_path)
    for trainer, options, words in (
        (
            trainer_for(tmp_path, d_ff=96),
            InitConfig(from_huggingface=folder, fresh=("encoder", "memory")),
            "its d_ff is 72, model.d_ff is 96",
        ),
        (
            trainer_for(tmp_path),
            InitConfig(from_huggingface=folder, fresh=("llm", "encoder", "memory")),
            "part 'llm' comes from there; this run has none, or names it too",
        ),
        (
            trainer_for(tmp_path),
            InitConfig(from_huggingface=folder),
            "has no part 'encoder'; name it in init.take or init.fresh",
        ),
    ):
        with pytest.raises(UserError, match=words):
            initial_state(trainer, options, seed=0)


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
    text = (ROOT / "docs" / "huggingface.md").read_text().split("```python\n")[1].split("```")[0]
    text = text.replace("FOLDER", str(tmp_path / "model")).replace('path="DATA", ', "")
    (tmp_path / "mine.py").write_text(text)
    small = (
        "encoder.target_levels=(3,4)", "encoder.orders=3", "encoder.rows=64", "encoder.d_mem=16",
        "data.sequence_length=32", "data.batch_size=4", "data.synthetic.users=50", "steps=2",
        "data.synthetic.items=200", "evaluation.validation_examples=8",
    )  # fmt: skip
    prefixmem("train", tmp_path / "mine.py", "--out", tmp_path / "run", *small)
    assert (tmp_path / "run" / "checkpoints" / "2").is_dir()
