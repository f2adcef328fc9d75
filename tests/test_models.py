"""The full-size configs are the models they are named after: parameter for parameter, by family."""

import json

import jax
import pytest
import torch
from conftest import ROOT
from flax import nnx
from transformers import AutoConfig, AutoModelForCausalLM

from prefixmem_jax.config_files import load_config
from prefixmem_jax.hf.families import decoder_config, differing_key, read_folder
from prefixmem_jax.hf.mapping import Architecture, weights
from prefixmem_jax.models.decoder import Decoder

QWEN3 = {
    "model_type": "qwen3", "vocab_size": 151_936, "num_key_value_heads": 8, "head_dim": 128,
    "tie_word_embeddings": True, "max_position_embeddings": 40_960, "rms_norm_eps": 1e-6,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1_000_000},
}  # fmt: skip
LLAMA3 = {
    "model_type": "llama", "vocab_size": 128_256, "intermediate_size": 8192,
    "num_key_value_heads": 8, "tie_word_embeddings": True, "max_position_embeddings": 131_072,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {
        "rope_type": "llama3", "rope_theta": 500_000.0, "factor": 32.0, "low_freq_factor": 1.0,
        "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
    },
}  # fmt: skip
# The models' published configs, where they matter to what is computed.
PUBLISHED = {
    "qwen3_0p6b": {
        **QWEN3, "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28,
        "num_attention_heads": 16,
    },
    "qwen3_1p7b": {
        **QWEN3, "hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 28,
        "num_attention_heads": 16,
    },
    "qwen3_4b": {
        **QWEN3, "hidden_size": 2560, "intermediate_size": 9728, "num_hidden_layers": 36,
        "num_attention_heads": 32,
    },
    "llama3p2_1b": {
        **LLAMA3, "hidden_size": 2048, "num_hidden_layers": 16, "num_attention_heads": 32,
        "head_dim": 64,
    },
    "llama3p2_3b": {
        **LLAMA3, "hidden_size": 3072, "num_hidden_layers": 28, "num_attention_heads": 24,
        "head_dim": 128,
    },
    "gemma3_1b": {
        "model_type": "gemma3_text", "vocab_size": 262_144, "hidden_size": 1152,
        "intermediate_size": 6912, "num_hidden_layers": 26, "num_attention_heads": 4,
        "num_key_value_heads": 1, "head_dim": 256, "sliding_window": 512,
        "query_pre_attn_scalar": 256, "rms_norm_eps": 1e-6, "max_position_embeddings": 32_768,
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
            "full_attention": {"rope_type": "default", "rope_theta": 1_000_000.0},
        },
    },
}  # fmt: skip
# As the models' own pages count them.
PARAMETERS = {
    "qwen3_0p6b": 0.596e9, "qwen3_1p7b": 1.72e9, "qwen3_4b": 4.02e9, "llama3p2_1b": 1.236e9,
    "llama3p2_3b": 3.213e9, "gemma3_1b": 1.0e9,
}  # fmt: skip


def test_every_model_config_is_here():
    assert {path.stem for path in (ROOT / "configs" / "models").glob("*.py")} == set(PUBLISHED)


@pytest.mark.parametrize("name", PUBLISHED)
def test_shapes_equal_the_huggingface_models(name):
    published = AutoConfig.for_model(**PUBLISHED[name])
    config = load_config(ROOT / "configs" / "models" / f"{name}.py")
    assert differing_key(decoder_config(published, name), config.model) is None
    assert config.data.text_tokens == published.vocab_size
    with torch.device("meta"):
        oracle = AutoModelForCausalLM.from_config(published)
    expected = {key: tuple(value.shape) for key, value in oracle.named_parameters()}
    decoder = nnx.eval_shape(
        lambda: Decoder(config.model, config.data.text_tokens, rngs=nnx.Rngs(0))
    )
    params = {"llm": nnx.to_pure_dict(nnx.state(decoder, nnx.Param))}
    found = {}
    for weight in weights(Architecture(config.model)):
        shape = params
        for key in weight.path:
            shape = shape[key]
        shape = shape.shape
        for layer in range(shape[0]) if weight.per_layer else (None,):
            own = weight.hf_shape(shape if layer is None else shape[1:])
            found[weight.name.format(layer=layer)] = own
    assert found == expected
    total = sum(leaf.size for leaf in jax.tree.leaves(params))
    assert total == pytest.approx(PARAMETERS[name], rel=0.01)
    assert total == sum(parameter.numel() for parameter in oracle.parameters())


# As the files on the hub say it, from before `rope_parameters`.
OLDER = {
    "llama3p2_1b": {
        "rope_theta": 500_000.0,
        "rope_scaling": {
            "rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
        },
    },
    "gemma3_1b": {
        "rope_theta": 1_000_000, "rope_local_base_freq": 10_000, "rope_scaling": None,
        "sliding_window_pattern": 6,
    },
    "qwen3_4b": {"rope_theta": 1_000_000, "rope_scaling": None, "use_sliding_window": False},
}  # fmt: skip


@pytest.mark.parametrize("name", OLDER)
def test_older_config_files_say_the_same(name, tmp_path):
    content = {k: v for k, v in PUBLISHED[name].items() if k != "rope_parameters"} | OLDER[name]
    (tmp_path / "config.json").write_text(json.dumps(content))
    config = load_config(ROOT / "configs" / "models" / f"{name}.py")
    assert differing_key(read_folder(tmp_path).decoder, config.model) is None
