"""What a scope freezes stays bit-identical; what it trains is trained, on any mesh."""

import dataclasses

import jax
import numpy as np
import pytest

from prefixmem_jax.config import (
    Config,
    DataConfig,
    DecoderConfig,
    MeshConfig,
    OptimizerConfig,
    PrefixMemoryConfig,
    SyntheticConfig,
)
from prefixmem_jax.config_files import load_config, to_json
from prefixmem_jax.data.prepare import prepare_data
from prefixmem_jax.data.sequences import pack_training_rows
from prefixmem_jax.errors import UserError
from prefixmem_jax.parallel.mesh import make_mesh
from prefixmem_jax.parallel.sharding import batch_sharding
from prefixmem_jax.training.loop import check_mesh
from prefixmem_jax.training.step import Trainer

TEXT = 10
CONFIG = Config(
    "scopes",
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
    encoder=PrefixMemoryConfig(target_levels=(2, 3), orders=2, heads=2, rows=300, d_mem=16),
    optimizer=OptimizerConfig(warmup_steps=0, weight_decay=0.5),
)
DATA = prepare_data(CONFIG.data)
SPACE = DATA.catalog.space
ROWS = pack_training_rows(DATA.catalog, DATA.split.train, 32, 20, seed=0)


def trained(scope: str, tied: bool = False, mesh_sizes: tuple[int, ...] = (1, 1, 1)):
    """Parts before and after three steps, and the optimizer's state."""
    config = dataclasses.replace(
        CONFIG,
        model=dataclasses.replace(CONFIG.model, tied_embeddings=tied),
        optimizer=dataclasses.replace(CONFIG.optimizer, scope=scope),
        mesh=MeshConfig(*mesh_sizes),
    )
    mesh = make_mesh(config.mesh, jax.devices()[: int(np.prod(mesh_sizes))])
    check_mesh(config, SPACE, mesh)
    trainer = Trainer.create(config, SPACE, mesh)
    state = trainer.init_sharded(0)
    before = jax.device_get(state)
    step = trainer.compile_train_step()
    for start in (0, 8, 16):
        batch = {name: array[start : start + 8] for name, array in ROWS.items()}
        state, _ = step(state, jax.device_put(batch, batch_sharding(mesh)))
    return before, jax.device_get(state)


def bits(array: np.ndarray) -> np.ndarray:
    return array.view(np.uint32)


@pytest.mark.parametrize("mesh_sizes", [(1, 1, 1), (2, 2, 2)])
@pytest.mark.parametrize("tied", [False, True])
def test_new_tokens_and_encoder(tied, mesh_sizes):
    before, after = trained("new_tokens", tied, mesh_sizes)
    old, new = before.params["llm"], after.params["llm"]
    tables = {"embedding": 0} if tied else {"embedding": 0, "head": 1}
    for name, axis in tables.items():
        first, then = (np.moveaxis(x[name], axis, 0) for x in (old, new))
        assert np.array_equal(bits(first[:TEXT]), bits(then[:TEXT]))
        codes = SPACE.encode(DATA.catalog.sids)
        assert (first[codes] != then[codes]).any(axis=-1).all()
    rest = [{k: v for k, v in llm.items() if k not in tables} for llm in (old, new)]
    same = jax.tree.map(lambda a, b: np.array_equal(bits(a), bits(b)), *rest)
    assert len(jax.tree.leaves(same)) >= 11 and all(jax.tree.leaves(same))
    assert not np.array_equal(
        before.params["encoder"]["projection"], after.params["encoder"]["projection"]
    )
    assert not np.array_equal(before.memory, after.memory)
    largest = max(leaf.size for leaf in jax.tree.leaves(after.optimizer))
    assert largest == old["embedding"].size  # no state for what is frozen


def test_encoder_alone():
    before, after = trained("encoder")
    same = jax.tree.map(
        lambda a, b: np.array_equal(bits(a), bits(b)), before.params["llm"], after.params["llm"]
    )
    assert all(jax.tree.leaves(same))
    assert not np.array_equal(
        before.params["encoder"]["projection"], after.params["encoder"]["projection"]
    )
    assert not np.array_equal(before.memory, after.memory)
    largest = max(leaf.size for leaf in jax.tree.leaves(after.optimizer))
    assert largest == after.params["encoder"]["projection"].size


def test_frozen_gradients_do_not_count_in_the_norm_that_is_clipped():
    """With everything trained, the same batch has a larger gradient."""
    norms = {}
    for scope in ("everything", "new_tokens", "encoder"):
        optimizer = dataclasses.replace(CONFIG.optimizer, scope=scope)
        config = dataclasses.replace(CONFIG, optimizer=optimizer)
        trainer = Trainer.create(config, SPACE, make_mesh(devices=jax.devices()[:1]))
        batch = {name: array[:8] for name, array in ROWS.items()}
        batch = jax.device_put(batch, batch_sharding(trainer.mesh))
        _, metrics = trainer.compile_train_step()(trainer.init_sharded(0), batch)
        norms[scope] = float(metrics["gradient_norm"])
    assert norms["everything"] > norms["new_tokens"] > norms["encoder"] > 0


def test_the_vocabulary_is_filled_up():
    assert SPACE.vocabulary_size == 40 and SPACE.token_range(3)[1] == TEXT + 2 + 23
    level, _ = SPACE.level_and_code(np.arange(40))
    assert np.asarray(level).tolist() == [0] * 12 + [1] * 6 + [2] * 8 + [3] * 9 + [0] * 5


def test_a_scope_of_nothing_is_refused(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(to_json(dataclasses.replace(CONFIG, encoder=None)))
    with pytest.raises(UserError, match="encoder is none"):
        load_config(path, ["optimizer.trainable=encoder"])
    with pytest.raises(UserError, match="'all' is not one of everything, new_tokens, encoder"):
        load_config(path, ["optimizer.trainable=all"])
