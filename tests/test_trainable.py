"""What is frozen stays bit-identical; what is trainable is trained, on any mesh."""

import dataclasses
import functools
import math

import jax
import numpy as np
import optax
import pytest

from prefixmem_jax.config import Config
from prefixmem_jax.config_files import load_config, to_json
from prefixmem_jax.config_groups import (
    DataConfig,
    DecoderConfig,
    MeshConfig,
    OptimizerConfig,
    SyntheticConfig,
)
from prefixmem_jax.data.batch import take_rows
from prefixmem_jax.data.documents.document import Corpus
from prefixmem_jax.data.prepare import prepare_data
from prefixmem_jax.errors import UserError
from prefixmem_jax.model_spec import ModelSpec
from prefixmem_jax.objectives.next_token import NextToken
from prefixmem_jax.parallel.mesh import make_mesh
from prefixmem_jax.parallel.sharding import batch_sharding
from prefixmem_jax.sid_encoders.prefix_memory import PrefixMemoryConfig
from prefixmem_jax.training.state import init_sharded
from prefixmem_jax.training.step import check_mesh, compile_train_step

TEXT = 10
CONFIG = Config(
    "trainable",
    data=DataConfig(
        text_tokens=TEXT,
        vocabulary_multiple=8,
        sequence_length=32,
        batch_size=8,
        synthetic=SyntheticConfig(
            items=100, users=200, codebook_sizes=(6, 8, 9), children=(6, 4, 4)
        ),
    ),
    model=DecoderConfig(d_model=32, d_ff=48, head_dim=8),
    sid_encoder=PrefixMemoryConfig(target_levels=(2, 3), orders=2, heads=2, rows=300, d_mem=16),
    optimizer=OptimizerConfig(warmup_steps=0, weight_decay=0.5),
)
DATA = prepare_data(CONFIG.data)
VOCABULARY = DATA.vocabulary
ROWS = NextToken().training_rows(Corpus(DATA, CONFIG.data), seed=0)


@functools.cache
def trained(trainable: str, tied: bool = False, mesh_sizes: tuple[int, ...] = (1, 1, 1)):
    """States before and after three steps, and the norm of the first gradient."""
    config = dataclasses.replace(
        CONFIG,
        model=dataclasses.replace(CONFIG.model, tied_embeddings=tied),
        optimizer=dataclasses.replace(CONFIG.optimizer, trainable=trainable),
        mesh=MeshConfig(*mesh_sizes),
    )
    mesh = make_mesh(config.mesh, jax.devices()[: math.prod(mesh_sizes)])
    check_mesh(config, VOCABULARY, mesh)
    spec = ModelSpec.create(config, VOCABULARY, mesh)
    state = init_sharded(spec, 0)
    before = jax.tree.map(np.array, state)
    step = compile_train_step(spec)
    norms = []
    for start in (0, 8, 16):
        batch = take_rows(ROWS, slice(start, start + 8))
        state, metrics = step(state, jax.device_put(batch, batch_sharding(mesh)))
        norms.append(float(metrics["gradient_norm"]))
        if start == 0:
            for part, norm in metrics["update_norms"].items():
                old, new = (
                    at.memory if part == "memory" else at.params[part] for at in (before, state)
                )
                moved = jax.tree.map(lambda a, b: np.array(a) - b, new, old)
                assert float(norm) == pytest.approx(float(optax.tree.norm(moved)), rel=1e-3), part
    return before, jax.device_get(state), norms[0]


def bits(array: np.ndarray) -> np.ndarray:
    return array.view(np.uint32)


@pytest.mark.parametrize("mesh_sizes", [(1, 1, 1), (2, 2, 2)])
@pytest.mark.parametrize("tied", [False, True])
def test_new_tokens_and_the_sid_encoder(tied, mesh_sizes):
    before, after, _ = trained("new_tokens", tied, mesh_sizes)
    old, new = before.params["llm"], after.params["llm"]
    tables = {"embedding": 0} if tied else {"embedding": 0, "head": 1}
    for name, axis in tables.items():
        first, then = (np.moveaxis(x[name], axis, 0) for x in (old, new))
        assert np.array_equal(bits(first[:TEXT]), bits(then[:TEXT]))
        tokens = VOCABULARY.encode(DATA.catalog.sids)
        assert (first[tokens] != then[tokens]).any(axis=-1).all()
    rest = [{k: v for k, v in llm.items() if k not in tables} for llm in (old, new)]
    same = jax.tree.map(lambda a, b: np.array_equal(bits(a), bits(b)), *rest)
    assert len(jax.tree.leaves(same)) >= 11 and all(jax.tree.leaves(same))
    assert not np.array_equal(
        before.params["sid_encoder"]["projection"], after.params["sid_encoder"]["projection"]
    )
    assert not np.array_equal(before.memory, after.memory)
    largest = max(leaf.size for leaf in jax.tree.leaves(after.optimizer))
    assert largest == old["embedding"].size  # no state for what is frozen


def test_the_sid_encoder_alone():
    before, after, _ = trained("sid_encoder")
    same = jax.tree.map(
        lambda a, b: np.array_equal(bits(a), bits(b)), before.params["llm"], after.params["llm"]
    )
    assert all(jax.tree.leaves(same))
    assert not np.array_equal(
        before.params["sid_encoder"]["projection"], after.params["sid_encoder"]["projection"]
    )
    assert not np.array_equal(before.memory, after.memory)
    largest = max(leaf.size for leaf in jax.tree.leaves(after.optimizer))
    assert largest == after.params["sid_encoder"]["projection"].size


def test_frozen_gradients_do_not_count_in_the_norm_that_is_clipped():
    """With everything trained, the same batch has a larger gradient."""
    norms = [trained(name)[2] for name in ("everything", "new_tokens", "sid_encoder")]
    assert norms[0] > norms[1] > norms[2] > 0


def test_training_nothing_is_refused(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(to_json(dataclasses.replace(CONFIG, sid_encoder=None)))
    with pytest.raises(UserError, match="sid_encoder is none"):
        load_config(path, ["optimizer.trainable=sid_encoder"])
    with pytest.raises(UserError, match="'all' is not one of everything, new_tokens, sid_encoder"):
        load_config(path, ["optimizer.trainable=all"])
