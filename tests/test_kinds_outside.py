"""Objectives and SID encoders of somebody else's: one small file, one line in a config.

Nothing is registered; the command, the loop, the checkpoint and the engine take them as their own.
"""

import functools
import shutil
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models import whole_logits

from prefixmem_jax.config import Config
from prefixmem_jax.config_files import load_config, to_json
from prefixmem_jax.config_groups import (
    CheckpointConfig,
    DataConfig,
    DecoderConfig,
    EvaluationConfig,
    MeshConfig,
    OptimizerConfig,
    SyntheticConfig,
)
from prefixmem_jax.errors import UserError
from prefixmem_jax.runs.metrics import read_metrics
from prefixmem_jax.runs.run import Run
from prefixmem_jax.training.loop import train

CONFIG = Config(
    "outside",
    steps=6,
    log_every_steps=1,
    data=DataConfig(
        max_items=4,
        sequence_length=32,
        batch_size=8,
        vocabulary_multiple=2,
        synthetic=SyntheticConfig(items=60, users=80, codebook_sizes=(4, 5, 6), children=(4, 3, 3)),
    ),
    model=DecoderConfig(layers=1, d_model=16, d_ff=32, query_heads=2, head_dim=8),
    optimizer=OptimizerConfig(warmup_steps=0),
    mesh=MeshConfig(2, 2, 2),
    checkpoint=CheckpointConfig(every_steps=3),
    evaluation=EvaluationConfig(validation_examples=8),
)

FILES = {
    "nearness": '''
from dataclasses import dataclass
from typing import ClassVar

import jax.numpy as jnp
from flax import nnx

from prefixmem_jax.objectives.next_token import NextToken
from prefixmem_jax.parallel.parameters import normal
from prefixmem_jax.parallel.sharding import take


class TwoTables(nnx.Module):
    def __init__(self, tokens, width, rngs):
        self.before = normal(rngs, 0.3, (tokens, None), (width, None))
        self.after = normal(rngs, 0.3, (tokens, None), (width, None))


@dataclass(frozen=True)
class Nearness(NextToken):
    """Vectors of a token and of the next one come near each other; no decoder."""

    width: int = 4
    generates: ClassVar[bool] = False

    def build_model(self, config, vocabulary, rngs):
        return TwoTables(vocabulary.size, self.width, rngs)

    def loss_sums(self, model, batch, rows, key):
        following = jnp.pad(batch.tokens[:, 1:], ((0, 0), (0, 1)))
        here = take(model.before[...], batch.tokens, "batch", None, None)
        there = take(model.after[...], following, "batch", None, None)
        distance = jnp.sum((here - there) ** 2, axis=-1)
        return {"loss": jnp.sum(distance * batch.loss_mask), "count": jnp.sum(batch.loss_mask)}

    def summarize(self, sums, prefix=""):
        return {f"{prefix}loss": float(sums["loss"]) / float(sums["count"])}
''',
    "waves": '''
from dataclasses import dataclass

import jax.numpy as jnp

from prefixmem_jax.parallel.parameters import normal
from prefixmem_jax.sid_encoders.sid_encoder import SidEncoder, SidEncoderConfig


class Waves(SidEncoder):
    """The sine of a sum over the prefix's codes, each with a frequency of its level."""

    def __init__(self, vocabulary, scale, d_model, rngs):
        self.vocabulary, self.scale = vocabulary, scale
        self.frequencies = normal(rngs, 1.0, (vocabulary.levels, None), (d_model, None))

    def active(self, tokens_BS, segment_ids_BS):
        return self.vocabulary.prefixes(tokens_BS, segment_ids_BS)[0] > 0

    def __call__(self, tokens_BS, segment_ids_BS, rows, last=None):
        level_BS, codes_BSL = self.vocabulary.prefixes(tokens_BS, segment_ids_BS)
        phase_BSD = jnp.einsum("BSL,LD->BSD", codes_BSL + 0.5, self.frequencies[...])
        vectors_BSD = jnp.where(level_BS[..., None] > 0, self.scale * jnp.sin(phase_BSD), 0)
        return vectors_BSD if last is None else vectors_BSD[:, -last:]


@dataclass(frozen=True)
class WavesConfig(SidEncoderConfig):
    scale: float = 0.1

    def build(self, vocabulary, d_model, output_std, rngs):
        return Waves(vocabulary, self.scale, d_model, rngs)
''',
    "buckets": '''
from dataclasses import dataclass

import jax.numpy as jnp

from prefixmem_jax.memory.table import Table
from prefixmem_jax.parallel.parameters import normal
from prefixmem_jax.sid_encoders.sid_encoder import SidEncoder, SidEncoderConfig


class Buckets(SidEncoder):
    """A row for each of a few sums of the prefix's codes, and a projection of it."""

    def __init__(self, vocabulary, rows, d_model, rngs):
        self.vocabulary, self.rows = vocabulary, rows
        self.projection = normal(rngs, 5.0, (8, None), (d_model, None))

    def active(self, tokens_BS, segment_ids_BS):
        return self.vocabulary.prefixes(tokens_BS, segment_ids_BS)[0] > 0

    def addresses(self, tokens_BS, segment_ids_BS, last=None):
        level_BS, codes_BSL = self.vocabulary.prefixes(tokens_BS, segment_ids_BS)
        sums_BS = jnp.sum(codes_BSL * (7 ** jnp.arange(codes_BSL.shape[-1])), axis=-1) + level_BS
        rows_BS = jnp.where(level_BS > 0, sums_BS % self.rows, -1)
        return rows_BS[:, -(last or rows_BS.shape[1]) :, None]

    def __call__(self, tokens_BS, segment_ids_BS, rows_BPAW, last=None):
        return jnp.einsum("BPW,WD->BPD", rows_BPAW[:, :, 0], self.projection[...])


@dataclass(frozen=True)
class BucketsConfig(SidEncoderConfig):
    rows: int = 50

    def table(self, space):
        return Table(self.rows, 8)

    def build(self, vocabulary, d_model, output_std, rngs):
        return Buckets(vocabulary, self.rows, d_model, rngs)
''',
}
# The one line that names each.
LINES = {
    "nearness": "objective=nearness",
    "waves": "sid_encoder=waves",
    "buckets": "sid_encoder=buckets",
}


@pytest.fixture(scope="module", params=FILES)
def trained(request, tmp_path_factory):
    """A kind's name, the config, the run that it trained, and its final state on the host."""
    name, folder = request.param, tmp_path_factory.mktemp("outside")
    assert len(FILES[name].strip().splitlines()) <= 40
    (folder / f"{name}.py").write_text(FILES[name])
    (folder / "config.json").write_text(to_json(CONFIG))
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        config = load_config(folder / "config.json", [LINES[name]])
        yield name, config, folder / "run", jax.device_get(train(config, folder / "run"))
        sys.modules.pop(name)


def test_it_trains_and_a_resumed_run_ends_bit_identical(trained, tmp_path):
    name, config, folder, state = trained
    records = read_metrics(folder)
    losses = [record["loss"] for record in records if "loss" in record]
    assert len(losses) == 6 and losses[-1] < losses[0]
    validated = [record["validation/loss"] for record in records if "validation/loss" in record]
    assert validated and np.isfinite(validated).all()
    assert set(state.params) == {"nearness": {"before", "after"}}.get(name, {"llm", "sid_encoder"})
    assert (state.memory is not None) == (name == "buckets")

    shutil.copytree(folder, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "6")
    resumed = jax.device_get(train(config, tmp_path / "run"))
    jax.tree.map(np.testing.assert_array_equal, resumed, state)
    again = read_metrics(tmp_path / "run")
    assert [r.get("loss") for r in again] == [r.get("loss") for r in records]


def test_an_engine_searches_with_it_as_whole_forward_passes_do(trained):
    name, _, folder, _ = trained
    run, devices = Run(folder), jax.devices()
    if name == "nearness":
        with pytest.raises(UserError, match="a nearness:Nearness run has no decoder"):
            run.engine()
        return
    histories = [np.array([3, 17, 5]), np.array([9]), np.array([40, 2])]
    engine = run.engine(devices=devices[:4])  # a table's rows are spread over them
    codes, scores = engine.search(histories, 5, constrained=True)
    assert (engine.catalog.groups(codes.reshape(-1, 3)) >= 0).all()

    spec = run.spec(devices[:1])
    parts = jax.tree.map(lambda leaf: jnp.asarray(jax.device_get(leaf)), run.load(spec))
    expected = scores_without_cache(spec, parts, engine.item_tokens, histories, codes)
    np.testing.assert_allclose(scores, expected, rtol=1e-5, atol=2e-5)
    # The vectors matter: without them, every SID gets another score.
    silent = {**parts, "sid_encoder": jax.tree.map(jnp.zeros_like, parts["sid_encoder"])}
    silent = scores_without_cache(spec, silent, engine.item_tokens, histories, codes)
    assert (np.abs(silent - expected) > 1e-3).all()


def scores_without_cache(spec, parts, item_tokens, histories, codes):
    """Log-probabilities of SIDs [users, n, levels], a whole sequence for each."""
    model, vocabulary, rows_at = spec.model(without_memory(parts)), spec.vocabulary, None
    if spec.table is not None:
        rows_at = functools.partial(spec.table.gather, parts["memory"]["rows"])
    prompts = [np.r_[vocabulary.bos_token, item_tokens[h].reshape(-1)] for h in histories]
    tokens = vocabulary.encode(codes)
    sequences = [np.r_[p, sid] for p, sids in zip(prompts, tokens, strict=True) for sid in sids]
    logits = whole_logits(model, rows_at, sequences).reshape(*codes.shape[:2], -1, vocabulary.size)
    total = np.zeros(codes.shape[:2])
    for user, prompt in enumerate(prompts):
        for level in range(1, vocabulary.levels + 1):
            start, stop = vocabulary.token_range(level)
            at = jax.nn.log_softmax(logits[user, :, len(prompt) + level - 2, start:stop])
            total[user] += np.asarray(at)[np.arange(len(at)), codes[user, :, level - 1]]
    return total


def without_memory(parts):
    return {part: tree for part, tree in parts.items() if part != "memory"}
