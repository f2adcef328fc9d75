"""The decoder: packed against separate, cached against whole (test_hf.py: against torch)."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from prefixmem_jax.config import DecoderConfig
from prefixmem_jax.models.decoder import Cache, Decoder, causal_mask

SMALL = DecoderConfig(
    layers=3, d_model=40, d_ff=72, query_heads=6, kv_heads=3, head_dim=16, rope_base=1e6,
    init_std=0.2,
)  # fmt: skip
VOCABULARY = 53


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
