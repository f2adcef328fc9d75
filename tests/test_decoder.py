"""Attention against NumPy; the decoder packed against separate, cached against whole.

test_hf.py compares the decoder with torch.
"""

import contextlib
import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from prefixmem_jax.config_groups import DecoderConfig, MeshConfig
from prefixmem_jax.layers import attention as attention_module
from prefixmem_jax.layers import transformer
from prefixmem_jax.layers.attention import (
    NO_WINDOW,
    KeyValues,
    Place,
    attention,
    beam_attention,
    self_attention,
    visible,
)
from prefixmem_jax.layers.fixed_products import halves_swapped, mean_by_product
from prefixmem_jax.layers.flash_attention import flash_attention
from prefixmem_jax.layers.splash_attention import splash_attention
from prefixmem_jax.models.decoder import Decoder
from prefixmem_jax.parallel.mesh import make_mesh
from prefixmem_jax.parallel.sharding import constrain

SMALL = DecoderConfig(
    layers=3, d_model=40, d_ff=72, query_heads=6, kv_heads=3, head_dim=16, rope_base=1e6,
    init_std=0.2, sliding_layers=(1,), sliding_window=3,
)  # fmt: skip
VOCABULARY = 54


def by_loops(queries, keys, window):
    """`visible` for one sequence, a pair at a time."""
    seen = np.zeros((len(queries.positions), len(keys.positions)), bool)
    for s, (query, own) in enumerate(zip(*queries, strict=True)):
        for t, (key, other) in enumerate(zip(*keys, strict=True)):
            seen[s, t] = own == other and key <= query and query - key < window
    return seen


def numpy_attention(query_SNH, key_TKH, value_TKH, seen_ST, scale):
    """Softmax over the keys that are seen, a query and a head at a time, in float64."""
    attended = np.zeros(query_SNH.shape)
    heads, size = query_SNH.shape[1:]
    group = heads // key_TKH.shape[1]
    for s in range(len(query_SNH)):
        for n in range(heads):
            keys, values = (x[seen_ST[s], n // group].astype(float) for x in (key_TKH, value_TKH))
            logits = keys @ query_SNH[s, n] * (size**-0.5 if scale is None else scale)
            weights = np.exp(logits - logits.max())
            attended[s, n] = weights @ values / weights.sum()
    return attended


def places(length):
    ids = st.lists(st.integers(0, 4), min_size=length, max_size=length)
    return st.tuples(ids, ids).map(lambda two: Place(*(np.array(x, np.int32) for x in two)))


@settings(max_examples=100, deadline=None)
@given(queries=places(5), keys=places(7), window=st.integers(1, 6) | st.just(NO_WINDOW))
def test_what_a_query_sees_is_its_document_so_far_within_the_window(queries, keys, window):
    batched = (Place(*(x[None] for x in place)) for place in (queries, keys))
    found = np.asarray(visible(*batched, window))[0]
    np.testing.assert_array_equal(found, by_loops(queries, keys, window))


def random_numbers(*shapes):
    rng = np.random.default_rng(0)
    return [2 * rng.normal(size=shape).astype(np.float32) for shape in shapes]


@pytest.mark.parametrize(("heads", "kv_heads"), [(6, 3), (5, 1), (4, 4)])
@pytest.mark.parametrize("scale", [None, 0.5])
def test_attention_is_a_softmax_over_what_is_visible(heads, kv_heads, scale):
    """Two documents and padding in a row; a cache whose last places are not filled."""
    query, key, value = random_numbers((2, 9, heads, 8), (2, 9, kv_heads, 8), (2, 9, kv_heads, 8))
    segments = np.array([[1] * 4 + [2] * 3 + [0] * 2, [1] * 9])
    positions = np.array([[*range(4), *range(3), 0, 0], [*range(9)]])
    keys = Place(positions, segments)
    compiled = jax.jit(lambda *arguments: attention(*arguments, scale))
    for window in (1, 2, 3, NO_WINDOW):
        for rows in (slice(0, 9), slice(5, 7)):  # whole; two new tokens, two not written yet
            queries = Place(positions[:, rows], segments[:, rows])
            past = KeyValues(key.copy(), value.copy())
            if rows.stop == 7:
                past.keys[:, 7:] = past.values[:, 7:] = 1e3
            found = compiled(query[:, rows], queries, past, keys, window)
            for i in range(2):
                one = [Place(*(x[i] for x in place)) for place in (queries, keys)]
                seen = by_loops(*one, window)
                expected = numpy_attention(query[i, rows], key[i], value[i], seen, scale)
                np.testing.assert_allclose(found[i], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("heads", "kv_heads"), [(6, 3), (5, 1), (4, 4)])
@pytest.mark.parametrize("scale", [None, 0.5])
def test_beams_attend_to_their_prompt_and_to_their_own_tokens(heads, kv_heads, scale):
    """Prompts of 5 tokens and of 2 with padding; windows that end within a beam's 3 own tokens."""
    users, beams, count, length = 2, 4, 3, 5
    query, key, value, own_key, own_value = random_numbers(
        (users, beams, heads, 8),
        *[(users, length, kv_heads, 8)] * 2,
        *[(users, beams, count, kv_heads, 8)] * 2,
    )
    lengths = np.array([5, 2])
    segments = (np.arange(length) < lengths[:, None]).astype(np.int32)
    prompt_keys = Place(np.arange(length) * segments, segments)
    last = np.broadcast_to(lengths[:, None] + count - 1, (users, beams))
    prompt, own = KeyValues(key, value), KeyValues(own_key, own_value)
    compiled = jax.jit(lambda *arguments: beam_attention(*arguments, scale))
    for window in (1, 2, 3, 4, 6, NO_WINDOW):
        queries = Place(last, np.ones_like(last))
        found = compiled(query, queries, prompt, prompt_keys, own, window)
        for user in range(users):
            kept = lengths[user]
            stands = np.arange(kept + count)
            seen = (kept + count - 1 - stands < window)[None]
            for beam in range(beams):
                keys = np.concatenate([key[user, :kept], own_key[user, beam]])
                values = np.concatenate([value[user, :kept], own_value[user, beam]])
                one = query[user, beam][None]
                expected = numpy_attention(one, keys, values, seen, scale)[0]
                np.testing.assert_allclose(found[user, beam], expected, rtol=1e-4, atol=1e-5)


@jax.jit
def run(decoder, tokens, segments, positions):
    hidden, kept = decoder(decoder.embed(tokens), Place(positions, segments))
    return decoder.softmax_head().logits(hidden), kept


@pytest.fixture(scope="module")
def whole():
    """A decoder, sequences, and their logits."""
    decoder = Decoder(SMALL, VOCABULARY, rngs=nnx.Rngs(0))
    tokens = jax.random.randint(jax.random.key(0), (2, 9), 0, VOCABULARY)
    positions = jnp.broadcast_to(jnp.arange(9), tokens.shape)
    return decoder, tokens, positions, run(decoder, tokens, jnp.ones_like(tokens), positions)[0]


def test_packed_documents_equal_separate_ones(whole):
    decoder = whole[0]
    tokens = jax.random.randint(jax.random.key(0), (1, 12), 0, VOCABULARY)
    segments = jnp.array([[1] * 5 + [2] * 4 + [0] * 3])
    positions = jnp.array([[*range(5), *range(4), *range(3)]])
    packed, _ = run(decoder, tokens, segments, positions)
    for start, stop in ((0, 5), (5, 9)):
        part = tokens[:, start:stop]
        alone, _ = run(decoder, part, jnp.ones_like(part), jnp.arange(stop - start)[None])
        np.testing.assert_allclose(packed[:, start:stop], alone, rtol=1e-4, atol=1e-5)


def test_cached_steps_equal_the_whole_sequence(whole):
    decoder, tokens, positions, expected = whole
    ones = jnp.ones_like(tokens)
    _, kept = run(decoder, tokens[:, :4], ones[:, :4], positions[:, :4])
    cache = jax.tree.map(lambda x: jnp.pad(x, ((0, 0), (0, 0), (0, 5), (0, 0), (0, 0))), kept)

    @jax.jit
    def extend(decoder, token, cache, at):
        queries = Place(jnp.full((2, 1), at), jnp.ones((2, 1), int))
        x = decoder.embed(token)
        hidden, cache = decoder.extend(x, queries, cache, Place(positions, ones), at)
        return hidden, cache

    for at in range(4, 9):
        hidden, cache = extend(decoder, tokens[:, at : at + 1], cache, at)
        found = decoder.softmax_head().logits(hidden)
        np.testing.assert_allclose(found[:, 0], expected[:, at], rtol=1e-4, atol=1e-5)
    some = decoder.softmax_head(10, 20).logits(hidden)
    np.testing.assert_allclose(some, found[..., 10:20], rtol=1e-6, atol=1e-6)


def gradients_of(tokens, positions, segments=None, longest_document=NO_WINDOW, **options):
    """A function of the decoder's parameters."""
    config = dataclasses.replace(SMALL, **options)
    abstract = nnx.eval_shape(
        lambda: Decoder(config, VOCABULARY, longest_document, rngs=nnx.Rngs(0))
    )
    graphdef, _ = nnx.split(abstract, nnx.Param)
    segments = jnp.ones_like(tokens) if segments is None else segments

    def loss(params):
        logits, _ = run.__wrapped__(nnx.merge(graphdef, params), tokens, segments, positions)
        return jnp.mean(logits**2, where=(segments > 0)[..., None])

    return jax.jit(jax.grad(loss))


def assert_same_trees(found, expected, **tolerance):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **tolerance), found, expected)


@pytest.mark.parametrize("remat", ["mlp", "dots", "offload", "full"])
def test_remat_changes_memory_and_not_gradients(remat, whole):
    decoder, tokens, positions, _ = whole
    params = nnx.state(decoder, nnx.Param)
    plain, again = gradients_of(tokens, positions), gradients_of(tokens, positions, remat=remat)
    recomputed, usual = (str(jax.make_jaxpr(f)(params)).count("remat") for f in (again, plain))
    assert recomputed > usual  # CPUs compute attention again in any case
    assert_same_trees(again(params), plain(params), rtol=1e-5, atol=1e-7)


def test_kept_products_of_weights_are_not_computed_again(whole):
    """Else six of a layer's seven are, since nothing asks for the last one's; and on CPUs attention's
    two in any case.
    """
    decoder, tokens, positions, _ = whole
    params = nnx.state(decoder, nnx.Param)
    products = {
        remat: str(jax.make_jaxpr(gradients_of(tokens, positions, remat=remat))(params)).count(
            "dot_general["
        )
        for remat in ("none", "mlp", "dots", "offload", "full")
    }
    assert products["mlp"] == products["none"] + 2 + 4
    assert products["dots"] == products["offload"] == products["none"] + 2
    assert products["full"] == products["none"] + 2 + 6


@pytest.mark.parametrize("remat", ["none", "mlp"])
def test_layers_compute_the_same_in_a_loop_and_without_one(remat):
    """All five layers, forward and backward; each by itself is in the program five times."""
    tokens = jax.random.randint(jax.random.key(2), (2, 9), 0, VOCABULARY)
    positions = jnp.broadcast_to(jnp.arange(9), (2, 9))
    deep = {"layers": 5, "sliding_layers": (1, 3), "remat": remat}
    config = dataclasses.replace(SMALL, **deep)
    params = nnx.state(Decoder(config, VOCABULARY, rngs=nnx.Rngs(0)), nnx.Param)
    programs = [
        gradients_of(tokens, positions, scan_layers=loop, **deep).lower(params).compile()
        for loop in (True, False)
    ]
    loops, whole = (program.as_text().count("while(") for program in programs)
    assert loops > whole
    looped, unrolled = (program(params) for program in programs)
    assert_same_trees(looped, unrolled, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(("rows", "pieces"), [(6, 3), (7, 7), (2, 1)])
def test_attention_of_a_few_rows_at_a_time_is_attention(rows, pieces, monkeypatch):
    """Forward and backward; numbers of rows that the pieces divide and do not."""
    query, key, value, weight = random_numbers(
        (rows, 9, 4, 8), *[(rows, 9, 2, 8)] * 2, (rows, 9, 4, 8)
    )
    place = Place(
        *(jnp.broadcast_to(x, (rows, 9)) for x in (jnp.arange(9) % 5, jnp.arange(9) // 5))
    )

    def gradients(attend):
        def loss(query, key, value):
            return jnp.sum(weight * attend(query, place, KeyValues(key, value)))

        return jax.value_and_grad(loss, (0, 1, 2))

    def whole(query, place, own):
        return attention(query, place, own, place, 3, 0.1)

    def in_pieces(query, place, own):
        return self_attention(query, place, own, 3, [3], 0.1)

    monkeypatch.setattr(attention_module, "CACHED_SCORES", 2 * 4 * 9 * 9)
    jaxpr = str(jax.make_jaxpr(gradients(in_pieces))(query, key, value))
    assert f"length={pieces}" in jaxpr
    found, expected = (jax.jit(gradients(f))(query, key, value) for f in (in_pieces, whole))
    assert_same_trees(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("heads", "kv_heads", "length", "windows"),
    [
        (6, 3, 300, (2, 130, NO_WINDOW)),
        (4, 1, 300, (2, 130)),
        (4, 2, 192, (2, 130, NO_WINDOW)),
        (6, 3, 9, (2, 130)),
        (4, 1, 9, (2,)),
    ],
)
def test_the_kernels_are_attention(heads, kv_heads, length, windows):
    """Forward and backward; lengths that no block divides, of which two rows of 192 are laid end to
    end; three documents and padding.
    """
    query, key, value, weight = random_numbers(
        (2, length, heads, 64), *[(2, length, kv_heads, 64)] * 2, (2, length, heads, 64)
    )
    segments = np.minimum(np.arange(length) // (length // 3 - 1) + 1, 4) % 4
    starts = np.searchsorted(segments[segments > 0], segments)
    segments = np.stack([segments, np.ones(length)]).astype(np.int32)
    positions = np.stack([np.where(segments[0] > 0, np.arange(length) - starts, 0), range(length)])
    place = Place(jnp.asarray(positions), jnp.asarray(segments))
    weight *= (segments > 0)[..., None, None]

    def gradients(attend):
        def loss(query, key, value):
            return jnp.sum(weight * attend(query, key, value))

        return jax.jit(jax.value_and_grad(loss, (0, 1, 2)))(query, key, value)

    named = {"scale": 0.1, "interpret": True}
    of_tpus = [(window, partial(splash_attention, window=window, **named)) for window in windows]
    for window, kernel in [*of_tpus, (NO_WINDOW, partial(flash_attention, **named))]:
        found = gradients(lambda *x, kernel=kernel: kernel(*x, place.segments))
        expected = gradients(
            lambda q, k, v, window=window: attention(q, place, KeyValues(k, v), place, window, 0.1)
        )
        assert_same_trees(found, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("size", [6, 128])
def test_products_with_constants_are_a_mean_and_a_swap(size):
    x = np.random.default_rng(0).normal(size=(2, 3, 4, size)).astype(np.float32)
    first, second = np.split(x, 2, axis=-1)
    np.testing.assert_array_equal(halves_swapped(x), np.concatenate([second, first], axis=-1))
    mean = np.broadcast_to(x.mean(-1, keepdims=True), x.shape)
    np.testing.assert_allclose(mean_by_product(x), mean, rtol=1e-5, atol=1e-6)


def packed_rows():
    """Tokens, positions and segments: three documents of ten tokens, and padding, a row."""
    tokens = jax.random.randint(jax.random.key(0), (8, 40), 0, VOCABULARY)
    segments, positions = jnp.repeat(jnp.array([1, 2, 3, 0]), 10), jnp.tile(jnp.arange(10), 4)
    return tokens, *(jnp.broadcast_to(x, tokens.shape) for x in (positions, segments))


@pytest.mark.parametrize("mesh", [None, (2, 2, 2)])
@pytest.mark.parametrize("options", [{}, {"sliding_layers": (), "remat": "full"}])
def test_a_decoder_computes_the_same_as_on_tpus(options, mesh, monkeypatch):
    """Two kinds of layers choose between two kernels; no document is longer than said."""
    config = {"query_heads": 4, "kv_heads": 2, **options}
    tokens, positions, segments = packed_rows()
    decoder = Decoder(dataclasses.replace(SMALL, **config), VOCABULARY, rngs=nnx.Rngs(0))
    params = nnx.state(decoder, nnx.Param)
    expected = gradients_of(tokens, positions, segments, **config)(params)
    kernels = []

    def interpreted(*operands, window, **named):
        kernels.append(window)
        return splash_attention(*operands, window=window, interpret=True, **named)

    monkeypatch.setattr(attention_module, "on_tpus", lambda: True)
    monkeypatch.setattr(transformer, "on_tpus", lambda: True)
    monkeypatch.setattr(attention_module, "splash_attention", interpreted)
    with contextlib.nullcontext() if mesh is None else jax.set_mesh(make_mesh(MeshConfig(*mesh))):
        places = (constrain(x, "batch", None) for x in (tokens, positions, segments))
        found = gradients_of(*places, longest_document=10, **config)(params)
    assert set(kernels) == ({3, 10} if config.get("sliding_layers", True) else {10})
    assert_same_trees(found, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("mesh", [None, (2, 2, 2)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_decoder_computes_the_same_as_on_gpus(dtype, mesh, monkeypatch):
    """By their kernel in bfloat16, where no window is nearer than a document's start: there as near
    to float32 as without the kernel.
    """
    config = {"query_heads": 4, "kv_heads": 2}
    tokens, positions, segments = packed_rows()
    decoder = Decoder(dataclasses.replace(SMALL, **config), VOCABULARY, rngs=nnx.Rngs(0))
    params = nnx.state(decoder, nnx.Param)
    exact = gradients_of(tokens, positions, segments, **config)(params)
    config["compute_dtype"] = dtype
    rounded = gradients_of(tokens, positions, segments, **config)(params)
    kernels = []

    def interpreted(*operands, **named):
        kernels.append(operands[0].dtype)
        return flash_attention(*operands, interpret=True, **named)

    def error(found):
        found, expected = jax.device_get((found, exact))
        return optax.global_norm(jax.tree.map(np.subtract, found, expected))

    monkeypatch.setattr(attention_module, "on_gpus", lambda: True)
    monkeypatch.setattr(attention_module, "flash_attention", interpreted)
    bound = 1.3 * error(rounded) + 1e-5 * optax.global_norm(exact)
    with contextlib.nullcontext() if mesh is None else jax.set_mesh(make_mesh(MeshConfig(*mesh))):
        places = [constrain(x, "batch", None) for x in (tokens, positions, segments)]
        plain = gradients_of(*places, longest_document=10, attention="plain", **config)(params)
        assert not kernels and error(plain) < bound
        found = gradients_of(*places, longest_document=10, **config)(params)
    assert set(kernels) == ({jnp.dtype("bfloat16")} if dtype == "bfloat16" else set())
    assert error(found) < bound


def test_gpus_keep_no_scores():
    """Lowered for them: kernels forward and backward, and nothing [S, S] between them."""
    query, own = (
        jnp.zeros((2, 300, 4, 128), jnp.bfloat16),
        jnp.zeros((2, 300, 2, 128), jnp.bfloat16),
    )

    def loss(query, key, value):
        segments = jnp.ones((2, 300), int)
        return jnp.sum(flash_attention(query, key, value, segments, scale=None))

    traced = jax.jit(jax.grad(loss, (0, 1, 2))).trace(query, own, own)
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert "mha_forward" in text and "mha_backward" in text and "triton" in text
    assert "2x384x4x128xbf16" in text and "384x384" not in text and "300x300" not in text


def test_bfloat16_computes_in_bfloat16_and_returns_float32_logits(whole):
    _, tokens, positions, expected = whole
    config = dataclasses.replace(SMALL, compute_dtype="bfloat16")
    rough = Decoder(config, VOCABULARY, rngs=nnx.Rngs(0))
    found, kept = run(rough, tokens, jnp.ones_like(tokens), positions)
    assert kept.keys.dtype == jnp.bfloat16 and found.dtype == jnp.float32
    assert rough.embedding[...].dtype == jnp.float32
    error = np.abs(found - expected).max() / np.abs(expected).max()
    assert 0 < error < 0.05
