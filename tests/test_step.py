"""The train step: golden numbers, a dense reference, any number of devices."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from prefixmem_jax.config import (
    Config,
    DataConfig,
    DecoderConfig,
    MemoryOptimizerConfig,
    MeshConfig,
    OptimizerConfig,
    PrefixMemoryConfig,
    SyntheticConfig,
)
from prefixmem_jax.data.prepare import prepare_data
from prefixmem_jax.data.sequences import pack_training_rows
from prefixmem_jax.errors import UserError
from prefixmem_jax.parallel.mesh import make_mesh
from prefixmem_jax.parallel.sharding import batch_sharding
from prefixmem_jax.training.flops import matmul_flops
from prefixmem_jax.training.loop import check_mesh
from prefixmem_jax.objectives.next_token import next_token_sums
from prefixmem_jax.training.optimizers import (
    dense_optimizer,
    learning_rate,
    memory_learning_rate,
    memory_optimizer,
)
from prefixmem_jax.training.step import Trainer, TrainState

CONFIG = Config(
    "test",
    steps=20,
    data=DataConfig(
        sequence_length=32,
        batch_size=8,
        synthetic=SyntheticConfig(
            items=100, users=200, codebook_sizes=(6, 8, 8), children=(6, 4, 4)
        ),
    ),
    model=DecoderConfig(d_model=32, d_ff=48, head_dim=8),
    encoder=PrefixMemoryConfig(target_levels=(2, 3), orders=2, heads=2, rows=300, d_mem=16),
    optimizer=OptimizerConfig(learning_rate=3e-3, warmup_steps=2, clip_norm=0.5),
)
DATA = prepare_data(CONFIG.data)
ROWS = pack_training_rows(DATA.catalog, DATA.split.train, 32, 20, seed=0)


def batch_at(step: int) -> dict[str, np.ndarray]:
    return {name: array[8 * step : 8 * step + 8] for name, array in ROWS.items()}


def run(config: Config, steps: int, devices: int = 1) -> tuple[list[dict], TrainState]:
    mesh = make_mesh(config.mesh, jax.devices()[:devices])
    check_mesh(config, DATA.catalog.space, mesh)
    trainer = Trainer.create(config, DATA.catalog.space, mesh)
    state = trainer.init_sharded(config.seed)
    train_step = trainer.compile_train_step()
    history = []
    for step in range(steps):
        sharding = batch_sharding(mesh)
        batch = {n: jax.device_put(a, sharding) for n, a in batch_at(step % 4).items()}
        state, metrics = train_step(state, batch)
        history.append(jax.device_get(metrics))
    return history, jax.device_get(state)


def test_golden_losses():
    """Numbers of this exact step; a change that moves them must be meant."""
    losses = {}
    for objective in ("next_token", "classification"):
        history, _ = run(dataclasses.replace(CONFIG, objective=objective), 3)
        losses[objective] = [float(metrics["loss"]) for metrics in history]
    np.testing.assert_allclose(losses["next_token"], GOLDEN["next_token"], rtol=1e-5)
    np.testing.assert_allclose(losses["classification"], GOLDEN["classification"], rtol=1e-5)


GOLDEN = {
    "next_token": [3.184775, 3.201779, 3.143424],
    "classification": [3.177984, 3.178320, 3.176395],
}


def test_a_model_that_cannot_tell_tokens_apart_has_no_hits():
    trainer = Trainer.create(CONFIG, DATA.catalog.space, make_mesh(devices=jax.devices()[:1]))
    state = jax.device_put(jax.device_get(trainer.init_sharded(0)), jax.devices()[0])
    llm = {**state.params["llm"], "head": 0 * state.params["llm"]["head"]}
    sums = trainer.evaluation_step({**state.params, "llm": llm}, state.memory, batch_at(0))
    assert np.asarray(sums["level_count"]).min() > 0
    assert not np.asarray(sums["hits"]).any()


def test_loss_falls():
    history, _ = run(CONFIG, 20)
    assert history[-1]["loss"] < 0.8 * history[0]["loss"]


def dense_reference(config: Config, steps: int) -> tuple[list[float], list[float], TrainState]:
    """Differentiates with respect to the whole table; only the optimizer update is row-wise."""
    trainer = Trainer.create(config, DATA.catalog.space, make_mesh(devices=jax.devices()[:1]))
    state = jax.device_put(jax.device_get(trainer.init_sharded(config.seed)), jax.devices()[0])
    losses, norms = [], []

    def loss(params, memory, batch):
        model = trainer.model(params)
        addresses = model.encoder.addresses(batch["tokens"], batch["segment_ids"])
        sums = next_token_sums(model, batch, trainer.table.lookup(memory, addresses))
        return sums["loss"] / sums["count"], addresses

    loss_and_gradients = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))
    for step in range(steps):
        batch = {name: jnp.asarray(array) for name, array in batch_at(step % 4).items()}
        (value, addresses), gradients = loss_and_gradients(state.params, state.memory, batch)
        norm = float(optax.tree.norm(gradients))
        scale = min(1.0, config.optimizer.clip_norm / norm)
        gradients = jax.tree.map(lambda g, scale=scale: g * scale, gradients)
        updates, optimizer = dense_optimizer(config).update(
            gradients[0], state.optimizer, state.params
        )
        params = optax.apply_updates(state.params, updates)
        row_updates, row_state = memory_optimizer(config).update(
            gradients[1], state.memory_optimizer, state.memory
        )
        touched = np.zeros(trainer.table.padded_rows, bool)
        touched[np.asarray(addresses)[np.asarray(addresses) >= 0]] = True
        touched = np.repeat(touched, trainer.table.width).reshape(trainer.table.shape)

        def keep(new, old, touched=touched):
            return jnp.where(touched, new, old) if new.shape == touched.shape else new

        memory = keep(state.memory + row_updates, state.memory)
        row_state = jax.tree.map(keep, row_state, state.memory_optimizer)
        state = TrainState(state.step + 1, params, optimizer, memory, row_state)
        losses.append(float(value))
        norms.append(norm)
    return losses, norms, state


def test_the_step_equals_a_dense_reference_with_row_gradients_in_the_clipped_norm():
    history, state = run(CONFIG, 6)
    losses, norms, expected = dense_reference(CONFIG, 6)
    np.testing.assert_allclose([m["loss"] for m in history], losses, rtol=1e-5)
    np.testing.assert_allclose([m["gradient_norm"] for m in history], norms, rtol=1e-4)
    assert min(norms) > CONFIG.optimizer.clip_norm  # the clipping did something
    np.testing.assert_allclose(state.memory, expected.memory, rtol=1e-4, atol=1e-6)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=2e-5),
        state.params,
        jax.device_get(expected.params),
    )


@pytest.mark.parametrize("objective", ["next_token", "classification"])
def test_any_mesh_of_1_2_4_and_8_devices_gives_the_same_losses_and_tables(objective):
    config = dataclasses.replace(CONFIG, objective=objective)
    history, state = run(config, 20)
    for sizes in ((2, 1, 1), (1, 4, 1), (8, 1, 1), (1, 1, 2), (2, 2, 2)):
        config = dataclasses.replace(config, mesh=MeshConfig(*sizes))
        other_history, other = run(config, 20, int(np.prod(sizes)))
        np.testing.assert_allclose(
            [m["loss"] for m in other_history], [m["loss"] for m in history], rtol=1e-5
        )
        np.testing.assert_allclose(other.memory, state.memory, rtol=1e-4, atol=2e-6)
        assert np.linalg.norm(other.memory - state.memory) < 1e-5 * np.linalg.norm(state.memory)


def test_tied_bfloat16_remat_steps_agree_across_meshes():
    model = dataclasses.replace(CONFIG.model, tied_embeddings=True, remat=True)
    config = dataclasses.replace(CONFIG, model=model)
    history, _ = run(config, 5)
    other, _ = run(dataclasses.replace(config, mesh=MeshConfig(1, 2, 2)), 5, 4)
    np.testing.assert_allclose([m["loss"] for m in other], [m["loss"] for m in history], rtol=1e-5)
    half = dataclasses.replace(config, model=dataclasses.replace(model, compute_dtype="bfloat16"))
    rough, _ = run(half, 5)
    np.testing.assert_allclose([m["loss"] for m in rough], [m["loss"] for m in history], rtol=0.02)
    other, _ = run(dataclasses.replace(half, mesh=MeshConfig(1, 2, 2)), 5, 4)
    np.testing.assert_allclose([m["loss"] for m in other], [m["loss"] for m in rough], rtol=0.02)


@pytest.mark.parametrize("sizes", [(1, 1, 1), (2, 1, 2)])
def test_accumulated_parts_of_a_batch_give_the_step_of_the_whole(sizes):
    config = dataclasses.replace(CONFIG, mesh=MeshConfig(*sizes))
    optimizer = dataclasses.replace(CONFIG.optimizer, accumulation_steps=4)
    cut = dataclasses.replace(config, optimizer=optimizer)
    (whole, state), (parts, other) = (run(c, 6, int(np.prod(sizes))) for c in (config, cut))
    for name in ("loss", "gradient_norm", "memory_rounds"):
        np.testing.assert_allclose([m[name] for m in parts], [m[name] for m in whole], rtol=1e-5)
    np.testing.assert_allclose(other.memory, state.memory, rtol=1e-4, atol=1e-6)
    np.testing.assert_array_equal(parts[0]["sums"]["hits"], whole[0]["sums"]["hits"])


def test_bfloat16_rows_learn_as_float32_rows_do():
    encoder = dataclasses.replace(CONFIG.encoder, dtype="bfloat16")
    config = dataclasses.replace(CONFIG, encoder=encoder)
    exact, _ = run(CONFIG, 20)
    rounded, state = run(config, 20)
    assert state.memory.dtype == "bfloat16"
    np.testing.assert_allclose([m["loss"] for m in rounded], [m["loss"] for m in exact], rtol=5e-3)
    other, _ = run(dataclasses.replace(config, mesh=MeshConfig(2, 2, 1)), 20, 4)
    np.testing.assert_allclose([m["loss"] for m in other], [m["loss"] for m in rounded], rtol=1e-3)


def test_fsdp_and_tensor_really_divide_the_state():
    config = dataclasses.replace(CONFIG, mesh=MeshConfig(1, 4, 2))
    trainer = Trainer.create(config, DATA.catalog.space, make_mesh(config.mesh))
    state = trainer.init_sharded(0)
    layers = state.params["llm"]["layers"]
    for leaf, parts in (
        (layers["query"], 8), (layers["down"], 8), (state.params["llm"]["embedding"], 8),
        (state.params["llm"]["head"], 8), (state.memory, 8), (layers["mlp_norm"]["scale"], 1),
    ):  # fmt: skip
        assert leaf.addressable_shards[0].data.size * parts == leaf.size
    moments = optax.tree.get(state.optimizer, "mu")["llm"]["layers"]["query"]
    assert moments.sharding.spec == layers["query"].sharding.spec


def test_sizes_that_do_not_fit_the_mesh_are_refused():
    for sizes, words in (
        ((3, 1, 1), "mesh: data=3, fsdp=1, tensor=1 does not fit 8 devices"),
        ((-1, -1, 1), "at most one -1"),
        ((1, 1, 8), "model.kv_heads=2 does not divide by 8"),
        ((4, 1, 2), "data.batch_size=8 does not divide by 16"),  # 4 devices, 4 parts
    ):
        optimizer = dataclasses.replace(CONFIG.optimizer, accumulation_steps=4)
        config = dataclasses.replace(CONFIG, mesh=MeshConfig(*sizes), optimizer=optimizer)
        with pytest.raises(UserError, match=words):
            run(config, 1, 8)


def test_baseline_and_encoder_start_from_the_same_decoder():
    _, with_encoder = run(CONFIG, 0)
    _, without = run(dataclasses.replace(CONFIG, encoder=None), 0)
    jax.tree.map(np.testing.assert_array_equal, with_encoder.params["llm"], without.params["llm"])
    assert without.memory is None and set(without.params) == {"llm"}


def test_norms_and_rows_are_not_decayed():
    decay = dataclasses.replace(CONFIG.optimizer, weight_decay=10.0)
    still = dataclasses.replace(CONFIG.optimizer, weight_decay=0.0)
    # The warm-up starts at rate 0, so the second step is the first that changes anything.
    _, decayed = run(dataclasses.replace(CONFIG, optimizer=decay), 2)
    _, plain = run(dataclasses.replace(CONFIG, optimizer=still), 2)
    llm, other = decayed.params["llm"], plain.params["llm"]
    np.testing.assert_allclose(llm["final_norm"]["scale"], other["final_norm"]["scale"], rtol=1e-6)
    np.testing.assert_array_equal(decayed.memory, plain.memory)
    assert np.linalg.norm(llm["embedding"]) < 0.999 * np.linalg.norm(other["embedding"])


@pytest.mark.parametrize("kind", ["adam", "row_adam", "adagrad", "sgd"])
def test_every_memory_optimizer_trains_and_keeps_its_state_with_the_rows(kind):
    memory = dataclasses.replace(CONFIG.optimizer.memory, kind=kind, weight_decay=0.01)
    optimizer = dataclasses.replace(CONFIG.optimizer, memory=memory)
    config = dataclasses.replace(CONFIG, objective="classification", optimizer=optimizer)
    history, state = run(config, 3)
    _, start = run(config, 0)
    assert np.isfinite(history[-1]["loss"])
    assert not np.array_equal(state.memory, start.memory)
    per_row = [x.size for x in jax.tree.leaves(state.memory_optimizer) if x.ndim]
    numbers = state.memory.size
    rows = numbers * CONFIG.encoder.heads // CONFIG.encoder.d_mem
    expected = {"adam": [numbers, numbers], "row_adam": [numbers, rows], "adagrad": [rows]}
    assert per_row == expected.get(kind, [])


def test_schedule_warms_up_and_decays():
    rate = learning_rate(dataclasses.replace(CONFIG, steps=100))
    assert float(rate(0)) == 0.0
    assert float(rate(2)) == pytest.approx(3e-3)
    assert float(rate(100)) == pytest.approx(3e-4)


def test_memory_rows_have_their_own_rate_and_schedule():
    config = dataclasses.replace(CONFIG, steps=100)
    rate = memory_learning_rate(config)
    assert [float(rate(n)) for n in (0, 2, 100)] == pytest.approx([0, 1.5e-2, 1.5e-3])
    own = MemoryOptimizerConfig(rate=2.0, warmup_steps=10, final_rate=0.5)
    optimizer = dataclasses.replace(CONFIG.optimizer, memory=own)
    rate = memory_learning_rate(dataclasses.replace(config, optimizer=optimizer))
    assert [float(rate(n)) for n in (0, 5, 10, 100)] == pytest.approx([0, 3e-3, 6e-3, 3e-3])


def test_flops_count_loops_and_match_the_formula():
    def scanned(x, weights):
        return jax.lax.scan(lambda x, w: (x @ w, None), x, weights)[0]

    x = jax.ShapeDtypeStruct((5, 7), jnp.float32)
    weights = jax.ShapeDtypeStruct((3, 7, 7), jnp.float32)
    assert matmul_flops(scanned, x, weights) == 3 * 2 * 5 * 7 * 7
    assert matmul_flops(jax.jit(scanned), x, weights) == 3 * 2 * 5 * 7 * 7
    counts = []
    for sizes in ((1, 1, 1), (2, 1, 1), (2, 2, 2)):  # the same work, however it is divided
        mesh = make_mesh(MeshConfig(*sizes), jax.devices()[: np.prod(sizes)])
        trainer = Trainer.create(CONFIG, DATA.catalog.space, mesh)
        with jax.set_mesh(mesh):
            state, batch = trainer.abstract_state(), trainer.abstract_batch()
            counts.append(matmul_flops(trainer.train_step, state, batch))
    assert counts[0] == counts[1] == counts[2] > 0


def test_nothing_in_the_step_has_the_size_of_the_table_but_the_table():
    """Temporary memory does not grow with the rows per table."""
    sizes = []
    for rows in (2**12, 2**18):
        encoder = dataclasses.replace(CONFIG.encoder, rows=rows)
        config = dataclasses.replace(CONFIG, encoder=encoder)
        trainer = Trainer.create(config, DATA.catalog.space, make_mesh(devices=jax.devices()[:1]))
        memory = trainer.compile_train_step().memory_analysis()
        sizes.append(memory.temp_size_in_bytes)
        table_bytes = 4 * np.prod(trainer.abstract_state().memory.shape)
        assert memory.alias_size_in_bytes >= 3 * table_bytes  # rows and moments are in place
    assert sizes[1] <= 1.05 * sizes[0]
