"""The SID-Transformer in the slot: what its vectors depend on, and that decoding agrees."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from models import prompts, small_config, whole_logits
from scipy.special import log_softmax

from prefixmem_jax.config_files import override
from prefixmem_jax.config_groups import CheckpointConfig, DecoderConfig, MeshConfig
from prefixmem_jax.convert import export_run
from prefixmem_jax.data.prepare import prepare_data
from prefixmem_jax.errors import UserError
from prefixmem_jax.models.sid_lm import SidLM
from prefixmem_jax.parallel.mesh import make_mesh
from prefixmem_jax.runs.metrics import read_metrics
from prefixmem_jax.runs.run import Run
from prefixmem_jax.semantic_ids.space import SidSpace
from prefixmem_jax.semantic_ids.vocabulary import Vocabulary
from prefixmem_jax.sid_encoders.sid_transformer import SidTransformerConfig
from prefixmem_jax.training.loop import train
from prefixmem_jax.training.step import check_mesh

SMALL = SidTransformerConfig(target_levels=(3, 4), layers=2, width=16, d_ff=24, heads=2)
VOCABULARY = Vocabulary(SidSpace((3, 4, 5, 6)), text_tokens=10)


@pytest.fixture(scope="module")
def module():
    return SMALL.build(VOCABULARY, 8, None, nnx.Rngs(0))


@pytest.fixture(scope="module")
def encoder(module):
    return jax.jit(module, static_argnames="last")


def sequence(*items, segment=1):
    tokens = np.concatenate([[VOCABULARY.bos_token], *VOCABULARY.encode(np.array(items))])
    return jnp.asarray(tokens)[None], jnp.full((1, len(tokens)), segment)


def test_a_vector_depends_on_its_prefix_alone(encoder):
    one = encoder(*sequence([1, 2, 3, 4], [2, 0, 1, 5]), None)[0]
    other = encoder(*sequence([0, 0, 0, 0], [2, 0, 1, 2], [1, 2, 3, 0]), None)[0]
    for at in (2, 3):
        np.testing.assert_allclose(one[at], other[8 + at], atol=1e-6)  # of item (1, 2, 3, any)
        np.testing.assert_allclose(one[4 + at], other[4 + at], atol=1e-6)  # (2, 0, 1, any)
    # Every prefix of two and of three codes has another one.
    every = list(itertools.product(range(3), range(4), range(5), [0]))
    found = np.asarray(encoder(*sequence(*every), None)[0])[1:].reshape(len(every), 4, 8)
    assert len(np.unique(found[:, 2].round(4), axis=0)) == 60
    assert len(np.unique(found[:, 1].round(4), axis=0)) == 12
    assert not found[:, [0, 3]].any()


def test_broken_items_and_text_say_nothing(encoder):
    tokens, segments = sequence([1, 2, 3, 4])
    broken = tokens.at[0, 2].set(3)  # text in the second place
    assert not encoder(broken, segments, None).any()
    assert not encoder(tokens, jnp.zeros_like(segments), None).any()
    halves = segments.at[0, 3:].set(2)  # the item lies across two documents
    assert (
        encoder(tokens, halves, None)[0, 2].any() and not encoder(tokens, halves, None)[0, 3:].any()
    )


def test_the_tokens_within_reach_are_enough(module, encoder):
    tokens, segments = sequence([1, 2, 3, 4], [2, 0, 1, 5])
    whole = encoder(tokens, segments, None)[0]
    for at in range(module.reach, tokens.shape[1]):
        cut = slice(at - module.reach, at + 1)
        alone = encoder(tokens[:, cut], segments[:, cut], None, last=1)[0]
        np.testing.assert_allclose(alone[0], whole[at], atol=1e-6)


def test_it_trains_and_its_search_scores_as_whole_sequences_do(tmp_path):
    """On eight devices; the beams' scores are those of a pass without a cache."""
    config = small_config(
        DecoderConfig(layers=1), 0, sid_encoder=SMALL, steps=6, log_every_steps=1,
        checkpoint=CheckpointConfig(every_steps=6),
    )  # fmt: skip
    config = override(config, "data.batch_size=8")
    train(config, tmp_path / "run")
    run = Run(tmp_path / "run")
    losses = [record["loss"] for record in read_metrics(run.path) if "loss" in record]
    assert losses[-1] < losses[0]
    data, engine = run.data(), run.engine()
    histories = data.split.test.take(np.arange(4)).histories()
    codes, scores = engine.search(histories, 6, constrained=False)
    spec = run.spec(jax.devices()[:1])
    model = spec.model(jax.tree.map(jnp.asarray, jax.device_get(run.load(spec, spec.params))))
    assert isinstance(model, SidLM)
    batch = prompts(model, data.catalog, histories, config.data.max_items)
    starts = [row[kept > 0] for row, kept in zip(batch.tokens, batch.segment_ids, strict=True)]
    tokens = data.vocabulary.encode(codes)
    sequences = [
        np.concatenate([start, sid])
        for start, sids in zip(starts, tokens, strict=True)
        for sid in sids
    ]
    logits = whole_logits(model, None, sequences).reshape(*scores.shape, -1, data.vocabulary.size)
    for user, beam in np.ndindex(scores.shape):
        total, before = 0.0, len(starts[user]) - 1
        for level, token in enumerate(tokens[user, beam]):
            first, stop = data.vocabulary.token_range(level + 1)
            here = log_softmax(logits[user, beam, before + level, first:stop])
            total += here[token - first]
        assert scores[user, beam] == pytest.approx(total, abs=1e-4)
    with pytest.raises(UserError, match="its SID encoder is sid_transformer"):
        export_run(run, tmp_path / "out")


@pytest.mark.parametrize("key, size", [("heads", 3), ("d_ff", 31)])
def test_a_mesh_that_its_sizes_do_not_divide_by_is_refused(key, size):
    encoder = dataclasses.replace(SMALL, **({"width": 24} if key == "heads" else {}), **{key: size})
    config = small_config(DecoderConfig(), 0, sid_encoder=encoder)
    mesh = make_mesh(MeshConfig(1, 1, 2), jax.devices()[:2])
    with pytest.raises(UserError, match=rf"sid_encoder\.{key}={size} does not divide by 2"):
        check_mesh(config, prepare_data(config.data).vocabulary, mesh)


@pytest.mark.parametrize(
    "text, words",
    [
        ("sid_encoder.target_levels=(1,)", r"level 1 is outside 2\.\.4"),
        ("sid_encoder.heads=3", "sid_encoder.width=16 does not divide by twice"),
        ("sid_encoder.target_levels=()", r"target_levels=\(\): expected one level or more"),
        ("sid_encoder.dropout=0.1", "sid_transformer has none; expected 0"),
    ],
)
def test_sizes_that_cannot_be_are_refused(text, words, tmp_path):
    config = small_config(DecoderConfig(), 0, sid_encoder=SMALL)
    config = override(override(config, "data.batch_size=8"), text)
    with pytest.raises(UserError, match=words):
        train(config, tmp_path / "run")
