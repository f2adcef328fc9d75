"""The decoder against transformers' Qwen3, packed against separate, cached against whole."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from transformers import Qwen3Config, Qwen3ForCausalLM

from prefixmem_jax.config import DecoderConfig
from prefixmem_jax.models.decoder import Cache, Decoder, causal_mask

SMALL = DecoderConfig(
    layers=3, d_model=40, d_ff=72, query_heads=6, kv_heads=3, head_dim=16, rope_base=1e6,
    init_std=0.2,
)  # fmt: skip
VOCABULARY = 53


def from_torch(oracle: Qwen3ForCausalLM, config: DecoderConfig) -> Decoder:
    """Our decoder with the oracle's weights."""
    weights = {name: tensor.numpy() for name, tensor in oracle.state_dict().items()}
    d, n, k, h = config.d_model, config.query_heads, config.kv_heads, config.head_dim

    def stack(name, shape, transpose=True):
        arrays = [weights[f"model.layers.{i}.{name}.weight"] for i in range(config.layers)]
        return jnp.stack([(a.T if transpose else a).reshape(shape) for a in arrays])

    decoder = Decoder(config, VOCABULARY, rngs=nnx.Rngs(0))
    layers = decoder.layers
    layers.query[...] = stack("self_attn.q_proj", (d, n, h))
    layers.key[...] = stack("self_attn.k_proj", (d, k, h))
    layers.value[...] = stack("self_attn.v_proj", (d, k, h))
    layers.output[...] = stack("self_attn.o_proj", (n, h, d))
    layers.query_norm.scale[...] = stack("self_attn.q_norm", (h,), False)
    layers.key_norm.scale[...] = stack("self_attn.k_norm", (h,), False)
    layers.attention_norm.scale[...] = stack("input_layernorm", (d,), False)
    layers.mlp_norm.scale[...] = stack("post_attention_layernorm", (d,), False)
    layers.gate[...] = stack("mlp.gate_proj", (d, config.d_ff))
    layers.up[...] = stack("mlp.up_proj", (d, config.d_ff))
    layers.down[...] = stack("mlp.down_proj", (config.d_ff, d))
    decoder.embedding[...] = jnp.asarray(weights["model.embed_tokens.weight"])
    decoder.final_norm.scale[...] = jnp.asarray(weights["model.norm.weight"])
    if not config.tied_embeddings:
        decoder.head[...] = jnp.asarray(weights["lm_head.weight"].T)
    return decoder


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kv_heads", [1, 3, 6])
def test_logits_equal_transformers_qwen3(tied, kv_heads):
    config = dataclasses.replace(SMALL, tied_embeddings=tied, kv_heads=kv_heads)
    torch.manual_seed(0)
    oracle = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=VOCABULARY,
            hidden_size=config.d_model,
            intermediate_size=config.d_ff,
            num_hidden_layers=config.layers,
            num_attention_heads=config.query_heads,
            num_key_value_heads=kv_heads,
            head_dim=config.head_dim,
            tie_word_embeddings=tied,
            rope_parameters={"rope_type": "default", "rope_theta": config.rope_base},
            rms_norm_eps=config.norm_epsilon,
            initializer_range=0.2,
        )
    ).eval()
    with torch.no_grad():
        for name, parameter in oracle.named_parameters():
            if "norm" in name:  # or a norm that is skipped would go unseen
                parameter.uniform_(0.5, 1.5)
    tokens = np.random.default_rng(0).integers(0, VOCABULARY, (2, 19))
    with torch.no_grad():
        expected = oracle(torch.tensor(tokens)).logits.numpy()
    decoder = from_torch(oracle, config)
    positions = jnp.broadcast_to(jnp.arange(19), tokens.shape)
    hidden, _ = decoder(
        decoder.embed(jnp.asarray(tokens)), positions, causal_mask(jnp.ones_like(positions))
    )
    found = np.asarray(decoder.logits(hidden))
    assert np.abs(found - expected).max() <= 1e-4 * np.abs(expected).max()


def run(decoder, tokens, segments, positions):
    hidden, cache = decoder(decoder.embed(tokens), positions, causal_mask(segments))
    return decoder.logits(hidden), cache


def test_packed_documents_equal_separate_ones():
    decoder = Decoder(SMALL, VOCABULARY, rngs=nnx.Rngs(0))
    tokens = jax.random.randint(jax.random.key(0), (1, 12), 0, VOCABULARY)
    segments = jnp.array([[1] * 5 + [2] * 4 + [0] * 3])
    positions = jnp.array([[*range(5), *range(4), *range(3)]])
    packed, _ = run(decoder, tokens, segments, positions)
    for start, stop in ((0, 5), (5, 9)):
        part = tokens[:, start:stop]
        alone, _ = run(decoder, part, jnp.ones_like(part), jnp.arange(stop - start)[None])
        np.testing.assert_allclose(packed[:, start:stop], alone, rtol=1e-4, atol=1e-5)


def test_cached_steps_equal_the_whole_sequence():
    decoder = Decoder(SMALL, VOCABULARY, rngs=nnx.Rngs(0))
    tokens = jax.random.randint(jax.random.key(0), (2, 9), 0, VOCABULARY)
    positions = jnp.broadcast_to(jnp.arange(9), tokens.shape)
    whole, _ = run(decoder, tokens, jnp.ones_like(tokens), positions)
    _, cache = run(decoder, tokens[:, :4], jnp.ones((2, 4), int), positions[:, :4])
    cache = Cache(*(jnp.pad(x, ((0, 0), (0, 0), (0, 5), (0, 0), (0, 0))) for x in cache))
    for at in range(4, 9):
        mask = jnp.broadcast_to(jnp.arange(9) <= at, (2, 1, 9))
        x = decoder.embed(tokens[:, at : at + 1])
        hidden, cache = decoder(x, positions[:, at : at + 1], mask, cache, at)
        np.testing.assert_allclose(decoder.logits(hidden)[:, 0], whole[:, at], rtol=1e-4, atol=1e-5)
    some = decoder.logits(hidden, 10, 20)
    np.testing.assert_allclose(some, decoder.logits(hidden)[..., 10:20], rtol=1e-6, atol=1e-6)


def test_remat_changes_memory_and_not_gradients():
    tokens = jax.random.randint(jax.random.key(0), (2, 9), 0, VOCABULARY)
    positions = jnp.broadcast_to(jnp.arange(9), tokens.shape)

    def gradient(remat):
        config = dataclasses.replace(SMALL, remat=remat)
        graphdef, params = nnx.split(Decoder(config, VOCABULARY, rngs=nnx.Rngs(0)))

        def loss(params):
            logits, _ = run(nnx.merge(graphdef, params), tokens, positions * 0 + 1, positions)
            return jnp.mean(logits**2)

        return jax.grad(loss), params

    plain, params = gradient(False)
    remat, _ = gradient(True)
    assert "remat" in str(jax.make_jaxpr(remat)(params))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7),
        plain(params),
        remat(params),
    )


def test_bfloat16_computes_in_bfloat16_and_returns_float32_logits():
    exact = Decoder(SMALL, VOCABULARY, rngs=nnx.Rngs(0))
    rough = Decoder(
        dataclasses.replace(SMALL, compute_dtype="bfloat16"), VOCABULARY, rngs=nnx.Rngs(0)
    )
    tokens = jax.random.randint(jax.random.key(0), (2, 9), 0, VOCABULARY)
    positions = jnp.broadcast_to(jnp.arange(9), tokens.shape)
    a, _ = run(exact, tokens, positions * 0 + 1, positions)
    b, cache = run(rough, tokens, positions * 0 + 1, positions)
    assert cache.keys.dtype == jnp.bfloat16 and b.dtype == jnp.float32
    assert rough.embedding[...].dtype == jnp.float32
    error = np.abs(a - b).max() / np.abs(a).max()
    assert 0 < error < 0.05
