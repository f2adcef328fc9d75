"""PrefixMem behind a gate: its formula, that decoding agrees, and where it cannot go."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from models import DECODER, make_decoder, make_run, small_config

from prefixmem_jax.convert import export_run
from prefixmem_jax.errors import UserError
from prefixmem_jax.inference.cached_sid_lm import rows_for
from prefixmem_jax.models.sid_lm import SidLM
from prefixmem_jax.semantic_ids.space import SidSpace
from prefixmem_jax.semantic_ids.vocabulary import Vocabulary
from prefixmem_jax.sid_encoders.gated_prefix_memory import GatedPrefixMemoryConfig
from prefixmem_jax.sid_encoders.prefix_memory import PrefixMemoryConfig

VOCABULARY = Vocabulary(SidSpace((7, 9, 5, 11)))
SIZES = dict(target_levels=(3, 4), orders=3, heads=2, rows=97, d_mem=8)
CONFIG = GatedPrefixMemoryConfig(**SIZES)


@pytest.fixture(scope="module")
def model():
    """Two items' tokens; a gated model and its rows, strong enough to see."""
    rngs = nnx.Rngs(0)
    model = SidLM(make_decoder(DECODER, VOCABULARY, rngs), CONFIG, VOCABULARY, rngs=rngs)
    encoder, table = model.sid_encoder, CONFIG.table(VOCABULARY.space)
    encoder.projection[...] = 50 * encoder.projection[...]
    encoder.embedding_norm.scale[...] = jnp.asarray(
        np.random.default_rng(0).normal(0, 2, DECODER.d_model)
    )
    rows_at = partial(table.gather, 20 * table.init(jax.random.key(1)))
    tokens = VOCABULARY.encode(np.array([[1, 2, 3, 4], [6, 0, 1, 10]])).reshape(1, -1)
    return model, rows_at, jnp.asarray(tokens)


def test_the_gate_is_the_formula(model):
    model, rows_at, tokens = model
    ones = jnp.ones_like(tokens)
    rows = rows_for(model, rows_at, tokens, ones)
    x = np.asarray(model.llm.embed(tokens), np.float64)[0]
    m = np.asarray(model.sid_encoder(tokens, ones, rows), np.float64)[0]
    w, added = (
        np.asarray(model.sid_encoder.embedding_norm.scale[...]),
        model.embed(tokens, ones, rows)[0] - x,
    )
    gates = []
    for at in range(tokens.shape[1]):
        rms = [np.sqrt(np.mean(one**2) + 1e-6) for one in (x[at], m[at])]
        score = sum(w * x[at] / rms[0] * m[at] / rms[1]) / np.sqrt(len(w))
        gates.append(1 / (1 + np.exp(-score)))
        np.testing.assert_allclose(added[at], gates[-1] * m[at], rtol=1e-4, atol=1e-5)
    # It speaks before levels 3 and 4 alone, and is another gate at each of them.
    speaks = [1, 2, 5, 6]
    assert np.abs(m[speaks]).max(axis=1).min() > 0.1 and not np.delete(m, speaks, axis=0).any()
    assert np.ptp([gates[at] for at in speaks]) > 0.1


def test_the_last_tokens_are_enough_for_decoding(model):
    model, rows_at, tokens = model
    ones = jnp.ones_like(tokens)
    whole = model.embed(tokens, ones, rows_for(model, rows_at, tokens, ones))
    for at in range(model.reach, tokens.shape[1]):
        window, known = (x[:, at - model.reach : at + 1] for x in (tokens, ones))
        rows = rows_for(model, rows_at, window, known, last=1)
        alone = model.embed(window, known, rows, last=1)[0, 0]
        np.testing.assert_allclose(alone, whole[0, at], rtol=1e-5, atol=1e-5)


def test_the_gate_learns(model):
    model, rows_at, tokens = model
    ones = jnp.ones_like(tokens)
    rows = rows_for(model, rows_at, tokens, ones)
    graph, params = nnx.split(model)

    def loss(params):
        return jnp.sum(nnx.merge(graph, params).embed(tokens, ones, rows) ** 2)

    gradient = nnx.to_pure_dict(jax.grad(loss)(params))["sid_encoder"]
    assert np.abs(gradient["embedding_norm"]["scale"]).min() > 0


def test_its_rows_are_prefixmems_and_it_is_not_exported(tmp_path):
    """So tables that classification trained can go under either; the exported model has no gate."""
    plain = PrefixMemoryConfig(**SIZES)
    ours, theirs = (c.row_meaning(VOCABULARY.space) for c in (CONFIG, plain))
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)
    run = make_run(tmp_path / "run", small_config(DECODER, 0, sid_encoder=CONFIG))
    assert run.config.sid_encoder == CONFIG  # what its config.json says
    histories = [np.array([3, 17, 5]), np.array([8])]
    codes, scores = run.engine().search(histories, 4, constrained=True)
    assert (run.catalog().groups(codes.reshape(-1, 4)) >= 0).all() and np.isfinite(scores).all()
    with pytest.raises(UserError, match="its SID encoder is gated_prefix_memory"):
        export_run(run, tmp_path / "out")
