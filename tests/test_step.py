"""The train step: golden numbers, a dense reference, any number of devices."""

import dataclasses
import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.experimental import pallas as pl
from test_hashing import row_numbers

from prefixmem_jax.config import Config
from prefixmem_jax.config_groups import (
    DataConfig,
    DecoderConfig,
    ItemHeadConfig,
    MemoryOptimizerConfig,
    MeshConfig,
    OptimizerConfig,
    SyntheticConfig,
)
from prefixmem_jax.data.batch import Batch, take_rows
from prefixmem_jax.data.documents.document import Corpus
from prefixmem_jax.data.prepare import prepare_data
from prefixmem_jax.errors import UserError
from prefixmem_jax.layers.fixed_products import halves_swapped, mean_by_product
from prefixmem_jax.memory.table import Lookup
from prefixmem_jax.model_spec import ModelSpec
from prefixmem_jax.objectives.classification import Classification
from prefixmem_jax.objectives.next_token import NextToken
from prefixmem_jax.objectives.tiger import Tiger
from prefixmem_jax.parallel.mesh import make_mesh
from prefixmem_jax.parallel.sharding import batch_sharding, constrain
from prefixmem_jax.semantic_ids.space import SidSpace
from prefixmem_jax.sid_encoders.prefix_memory import PrefixMemoryConfig
from prefixmem_jax.sid_encoders.sid_transformer import SidTransformerConfig
from prefixmem_jax.training.flops import kernel_flops, matmul_flops
from prefixmem_jax.training.optimizers import (
    dense_optimizer,
    learning_rate,
    memory_learning_rate,
    memory_optimizer,
)
from prefixmem_jax.training.state import (
    TrainState,
    abstract_state,
    init_sharded,
    trace_init,
)
from prefixmem_jax.training.step import (
    check_mesh,
    compile_train_step,
    flops_once,
    trace_train_step,
    validation_step,
)

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
    sid_encoder=PrefixMemoryConfig(target_levels=(2, 3), orders=2, heads=2, rows=300, d_mem=16),
    optimizer=OptimizerConfig(learning_rate=3e-3, warmup_steps=2, clip_norm=0.5),
    mesh=MeshConfig(1, 1, 1),
)
DATA = prepare_data(CONFIG.data)


@functools.cache
def rows_of(objective: NextToken) -> Batch:
    return objective.training_rows(Corpus(DATA, CONFIG.data), seed=0)


ROWS = rows_of(NextToken())


def on_mesh(config: Config, *sizes: Any) -> Config:
    return dataclasses.replace(config, mesh=MeshConfig(*sizes))


def with_optimizer(config: Config, **changes: Any) -> Config:
    return dataclasses.replace(config, optimizer=dataclasses.replace(config.optimizer, **changes))


def spec_of(config: Config) -> ModelSpec:
    sizes = (config.mesh.data, config.mesh.fsdp, config.mesh.tensor)
    devices = jax.devices()[: math.prod(sizes)] if min(sizes) > 0 else jax.devices()
    mesh = make_mesh(config.mesh, devices)
    check_mesh(config, DATA.vocabulary, mesh)
    return ModelSpec.create(config, DATA.vocabulary, mesh)


@functools.cache
def compiled(config: Config) -> tuple[ModelSpec, Callable]:
    """Tests that train the same config share its compiled step."""
    spec = spec_of(config)
    return spec, compile_train_step(spec)


def batch_at(step: int) -> Batch:
    return take_rows(ROWS, slice(8 * step, 8 * step + 8))


def on_host(tree: Any) -> Any:
    """A copy that donating the original leaves alone."""
    return jax.tree.map(lambda leaf: np.array(leaf), tree)


def run_from(
    config: Config, state: TrainState, steps: range, batches: Callable[[int], Batch]
) -> tuple[list[dict], TrainState]:
    """What the steps report, and the state after them, on the host.

    Args:
      state: on the host, from any mesh.
      batches: by step, on the host.
    """
    spec, step = compiled(config)
    sharding = batch_sharding(spec.mesh)
    state = jax.device_put(state, jax.tree.map(lambda leaf: leaf.sharding, abstract_state(spec)))
    history = []
    for number in steps:
        state, metrics = step(state, jax.device_put(batches(number), sharding))
        history.append(jax.device_get(metrics))
    return history, on_host(state)


@functools.cache
def fresh_state(config: Config) -> TrainState:
    """On the host."""
    return on_host(init_sharded(spec_of(config), config.seed))


def run(config: Config, steps: int) -> tuple[list[dict], TrainState]:
    """A fresh run, on the first devices that its mesh wants."""
    start = fresh_state(with_optimizer(on_mesh(config, 1, 1, 1), accumulation_steps=1))
    rows = rows_of(config.objective)

    def batch_of(step: int) -> Batch:
        return take_rows(rows, slice(8 * (step % 4), 8 * (step % 4) + 8))

    return run_from(config, start, range(steps), batch_of)


def losses(history: list[dict]) -> list[float]:
    return [float(metrics["loss"]) for metrics in history]


def assert_same_bits(found: Any, expected: Any) -> None:
    """NaNs and signs of zeros included."""
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    leaves = zip(jax.tree.leaves_with_path(found), jax.tree.leaves(expected), strict=True)
    for (path, leaf), other in leaves:
        assert leaf.dtype == other.dtype, path
        assert leaf.tobytes() == other.tobytes(), f"{jax.tree_util.keystr(path)} differs"


def test_golden_losses():
    """Numbers of this exact step; a change that moves them must be meant."""
    for objective in (NextToken(), Classification(), Tiger()):
        history, _ = run(dataclasses.replace(CONFIG, objective=objective), 20)
        np.testing.assert_allclose(losses(history)[:3], GOLDEN[type(objective)], rtol=1e-5)


GOLDEN = {
    NextToken: [3.194765, 3.188637, 3.122816],
    Classification: [3.177990, 3.177855, 3.176135],
    Tiger: [3.182057, 3.235895, 3.122094],
}


def test_a_model_that_cannot_tell_tokens_apart_has_no_hits():
    spec = spec_of(CONFIG)
    state = jax.device_put(
        fresh_state(CONFIG), jax.tree.map(lambda x: x.sharding, abstract_state(spec))
    )
    llm = {**state.params["llm"], "head": 0 * state.params["llm"]["head"]}
    batch = jax.device_put(batch_at(0), batch_sharding(spec.mesh))
    with jax.set_mesh(spec.mesh):
        step = jax.jit(functools.partial(validation_step, spec))
        sums = step({**state.params, "llm": llm}, state.memory, batch)
    assert np.asarray(sums["level_count"]).min() > 0
    assert not np.asarray(sums["hits"]).any()


def test_loss_falls():
    history, _ = run(CONFIG, 20)
    assert history[-1]["loss"] < 0.8 * history[0]["loss"]


def dense_reference(config: Config, steps: int) -> tuple[list[float], list[float], TrainState]:
    """Differentiates with respect to the whole table; only the optimizer update is row-wise."""
    spec = spec_of(config)
    state = jax.device_put(fresh_state(config), jax.devices()[0])
    values, norms = [], []

    def row_numbers_of(addresses):
        tables = spec.table.tables
        return jnp.where(addresses < 0, -1, addresses * tables + jnp.arange(tables))

    def loss(params, memory, batch):
        model = spec.model(params)
        lookup = model.memory_addresses(batch)
        addresses = lookup[:2]
        rows = Lookup(*(None if x is None else spec.table.gather(memory, x) for x in addresses))
        sums = config.objective.loss_sums(model, batch, rows, None)
        return sums["loss"] / sums["count"], jnp.concatenate(
            [row_numbers_of(x).reshape(-1) for x in addresses if x is not None]
        )

    @jax.jit
    def one_step(state, batch):
        (value, addresses), gradients = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(
            state.params, state.memory, batch
        )
        norm = optax.tree.norm(gradients)
        scale = jnp.minimum(1.0, config.optimizer.clip_norm / norm)
        gradients = jax.tree.map(lambda g: g * scale, gradients)
        updates, optimizer = dense_optimizer(config).update(
            gradients[0], state.optimizer, state.params
        )
        params = optax.apply_updates(state.params, updates)
        row_updates, row_state = memory_optimizer(config).update(
            gradients[1], state.memory_optimizer, state.memory
        )
        touched = jnp.isin(jnp.arange(spec.table.padded_rows), addresses)
        touched = jnp.repeat(touched, spec.table.width).reshape(spec.table.shape)

        def keep(new, old):
            return jnp.where(touched, new, old) if new.shape == touched.shape else new

        memory = keep(state.memory + row_updates, state.memory)
        row_state = jax.tree.map(keep, row_state, state.memory_optimizer)
        return TrainState(state.step + 1, params, optimizer, memory, row_state), value, norm

    for step in range(steps):
        state, value, norm = one_step(state, batch_at(step % 4))
        values.append(float(value))
        norms.append(float(norm))
    return values, norms, state


ITEMS = dataclasses.replace(
    CONFIG,
    sid_encoder=dataclasses.replace(CONFIG.sid_encoder, target_levels=(1, 2, 3), orders=3),
    item_head=ItemHeadConfig("memory", weight=0.5),
)


@pytest.mark.parametrize("config", [CONFIG, ITEMS], ids=["codes", "items"])
def test_the_step_equals_a_dense_reference_with_row_gradients_in_the_clipped_norm(config):
    history, state = run(config, 6)
    values, norms, expected = dense_reference(config, 6)
    earlier = run(config, 5)[1]
    after, before = ({**at.params, "memory": at.memory} for at in (state, earlier))
    assert set(history[-1]["update_norms"]) == set(after)
    for part, norm in history[-1]["update_norms"].items():
        moved = jax.tree.map(np.subtract, after[part], before[part])
        assert norm == pytest.approx(float(optax.tree.norm(moved)), rel=1e-3) and norm > 0
    np.testing.assert_allclose(losses(history), values, rtol=1e-5)
    np.testing.assert_allclose([m["gradient_norm"] for m in history], norms, rtol=1e-4)
    assert min(norms) > CONFIG.optimizer.clip_norm  # the clipping did something
    np.testing.assert_allclose(state.memory, expected.memory, rtol=1e-4, atol=1e-6)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=2e-5),
        state.params,
        jax.device_get(expected.params),
    )


@pytest.mark.parametrize(
    "objective, meshes",
    [
        (NextToken(), ((2, 1, 1), (1, 4, 1), (1, 1, 2), (2, 2, 2))),
        (Classification(), ((8, 1, 1), (2, 2, 2))),
        (Tiger(), ((2, 2, 2),)),
    ],
    ids=["llm", "classifier", "tiger"],
)
def test_any_mesh_of_1_2_4_and_8_devices_gives_the_same_losses_and_tables(objective, meshes):
    config = dataclasses.replace(CONFIG, objective=objective)
    history, state = run(config, 10)
    for sizes in meshes:
        other_history, other = run(on_mesh(config, *sizes), 10)
        np.testing.assert_allclose(losses(other_history), losses(history), rtol=1e-5)
        moved = [h[-1]["update_norms"]["memory"] for h in (other_history, history)]
        np.testing.assert_allclose(*moved, rtol=1e-3)
        np.testing.assert_allclose(other.memory, state.memory, rtol=1e-4, atol=2e-6)
        assert np.linalg.norm(other.memory - state.memory) < 1e-5 * np.linalg.norm(state.memory)


def test_a_transformer_in_the_slot_is_the_same_on_any_mesh():
    """Its embedding lies divided, as the decoder's does."""
    encoder = SidTransformerConfig(target_levels=(2, 3), layers=1, width=16, d_ff=24, heads=2)
    config = dataclasses.replace(CONFIG, sid_encoder=encoder)
    history, state = run(config, 5)
    divided = on_mesh(config, 2, 2, 2)
    embedding = spec_of(divided).params["sid_encoder"]["embedding"]
    assert embedding.sharding.shard_shape(embedding.shape)[1] == 16 // 4
    other_history, other = run(divided, 5)
    np.testing.assert_allclose(losses(other_history), losses(history), rtol=1e-5)
    chex.assert_trees_all_close(
        other.params["sid_encoder"], state.params["sid_encoder"], rtol=1e-3, atol=1e-4
    )


@pytest.mark.parametrize("sizes", [(1, 1, 1), (2, 2, 2)])
def test_a_memory_on_the_host_learns_what_one_on_the_device_does(sizes):
    on_device = on_mesh(CONFIG, *sizes)
    config = on_mesh(CONFIG, *sizes, "pinned_host")
    chex.assert_trees_all_close(fresh_state(config), fresh_state(on_device), rtol=1e-6)
    (history, state), (expected_history, expected) = run(config, 20), run(on_device, 20)
    np.testing.assert_allclose(losses(history), losses(expected_history), rtol=1e-6)
    np.testing.assert_allclose(state.memory, expected.memory, rtol=1e-5, atol=1e-6)


def test_tied_bfloat16_remat_steps_agree_across_meshes():
    model = dataclasses.replace(CONFIG.model, tied_embeddings=True, remat="full")
    config = dataclasses.replace(CONFIG, model=model)
    history, _ = run(config, 5)
    other, _ = run(on_mesh(config, 1, 2, 2), 5)
    np.testing.assert_allclose(losses(other), losses(history), rtol=1e-5)
    half = dataclasses.replace(config, model=dataclasses.replace(model, compute_dtype="bfloat16"))
    rough, _ = run(half, 5)
    np.testing.assert_allclose(losses(rough), losses(history), rtol=0.02)
    other, _ = run(on_mesh(half, 1, 2, 2), 5)
    np.testing.assert_allclose(losses(other), losses(rough), rtol=0.02)


DRAWN = dataclasses.replace(ITEMS, item_head=ItemHeadConfig("memory", negatives=20))


@pytest.mark.parametrize(
    "sizes, config",
    [((1, 1, 1), ITEMS), ((2, 1, 2), CONFIG), ((2, 1, 2), DRAWN)],
    ids=["items", "codes", "drawn"],
)
def test_accumulated_parts_of_a_batch_give_the_step_of_the_whole(sizes, config):
    config = on_mesh(config, *sizes)
    cut = with_optimizer(config, accumulation_steps=4)
    (whole, state), (parts, other) = run(config, 6), run(cut, 6)
    for name in ("loss", "gradient_norm", "memory_rounds"):
        np.testing.assert_allclose([m[name] for m in parts], [m[name] for m in whole], rtol=1e-5)
    np.testing.assert_allclose(other.memory, state.memory, rtol=1e-4, atol=1e-6)
    np.testing.assert_array_equal(parts[0]["sums"]["hits"], whole[0]["sums"]["hits"])


def test_distinct_rows_of_a_batch_are_counted():
    spec, history = spec_of(CONFIG), run(CONFIG, 3)[0]
    model = spec.model(fresh_state(CONFIG).params)
    for step, metrics in enumerate(history):
        named = model.memory_addresses(batch_at(step)).by_position
        named = row_numbers(named, spec.table.tables)
        assert metrics["memory_rows"] == len(np.unique(named[named >= 0])) > 10


def test_bfloat16_rows_learn_as_float32_rows_do():
    sid_encoder = dataclasses.replace(CONFIG.sid_encoder, dtype="bfloat16")
    config = dataclasses.replace(CONFIG, sid_encoder=sid_encoder)
    exact, _ = run(CONFIG, 20)
    rounded, state = run(config, 20)
    assert state.memory.dtype == "bfloat16"
    np.testing.assert_allclose(losses(rounded), losses(exact), rtol=5e-3)
    other, _ = run(on_mesh(config, 2, 2, 1), 20)
    np.testing.assert_allclose(losses(other), losses(rounded), rtol=1e-3)


def test_first_moments_in_bfloat16_take_half_and_learn_as_in_float32():
    config = with_optimizer(CONFIG, first_moment_dtype="bfloat16")
    (exact, whole), (rounded, half) = (run(one, 20) for one in (CONFIG, config))
    sizes = [
        sum(leaf.nbytes for leaf in jax.tree.leaves(state.optimizer[0].mu))
        for state in (whole, half)
    ]
    assert sizes[0] == 2 * sizes[1] > 0
    np.testing.assert_allclose(losses(rounded), losses(exact), rtol=2e-3)
    assert losses(rounded)[-1] != losses(exact)[-1]


@pytest.mark.parametrize(
    "what, sizes, pieces",
    [
        ("batch", (1, 1, 1), 1), ("batch", (2, 2, 2), 1), ("batch", (2, 1, 2), 4),
        ("parameter", (2, 1, 2), 4), ("gradient", (2, 1, 2), 4),
    ],
)  # fmt: skip
def test_a_step_that_is_not_finite_changes_no_bit(what, sizes, pieces):
    config = with_optimizer(on_mesh(CONFIG, *sizes), accumulation_steps=pieces)
    _, state = run(config, 6)
    batch = on_host(batch_at(2))
    if what == "batch":  # in one row, so on one device and in one piece alone
        batch.loss_mask[-1, 3] = np.nan
    elif what == "parameter":
        state.params["llm"]["final_norm"]["scale"][5] = np.inf
    else:  # the square of the rows' gradient overflows; their values are as if nothing were there
        state.memory[:] = 0
        state.params["sid_encoder"]["projection"][:] = 1e30
    (metrics,), after = run_from(config, state, range(1), lambda _: batch)
    assert not metrics["finite"]
    assert np.isfinite(metrics["loss"]) == (what == "gradient")
    assert int(after.step) == 6
    assert_same_bits(after, state)
    if what == "batch":  # and the next one is as if it had never been
        following = [
            run_from(config, start, range(1), lambda _: batch_at(2)) for start in (after, state)
        ]
        assert following[0][0][0]["finite"] and int(following[0][1].step) == 7
        assert_same_bits(*following)


@dataclass(frozen=True)
class HalfOfThem(Classification):
    """Leaves out half of the predictions at random, and tells a number that it drew."""

    def loss_sums(self, model, batch, rows, key):
        kept = jax.random.bernoulli(key, shape=batch.loss_mask.shape)
        mask = batch.loss_mask * constrain(kept, "batch", None)
        sums = super().loss_sums(model, batch._replace(loss_mask=mask), rows, None)
        drawn = jax.random.uniform(key)
        return {**sums, "drawn": jnp.stack([drawn, drawn**2])}


RANDOM = dataclasses.replace(CONFIG, objective=HalfOfThem())


def test_an_objective_that_draws_is_the_same_on_any_mesh_and_after_a_restart():
    def at(step):
        return batch_at(step % 4)

    history, final = run(RANDOM, 6)
    drawn = [float(metrics["sums"]["drawn"][0]) for metrics in history]
    assert len(set(drawn)) == 6
    # Half of a batch: the loss really depends on what was drawn.
    assert not np.allclose(
        losses(history),
        losses(run(dataclasses.replace(RANDOM, objective=Classification()), 6)[0]),
        rtol=1e-5,
    )
    _, middle = run(RANDOM, 3)
    resumed, end = run_from(RANDOM, middle, range(3, 6), at)
    assert losses(resumed) == losses(history)[3:]
    assert_same_bits(end, final)
    eight = on_mesh(RANDOM, 2, 2, 2)
    for others in (run(eight, 6)[0], history[:3] + run_from(eight, middle, range(3, 6), at)[0]):
        assert [float(metrics["sums"]["drawn"][0]) for metrics in others] == drawn
        np.testing.assert_allclose(losses(others), losses(history), rtol=1e-5)


def test_another_seed_draws_other_numbers():
    start = run(RANDOM, 0)[1]
    one, other = (
        run_from(dataclasses.replace(RANDOM, seed=seed), start, range(1), batch_at)[0][0]
        for seed in (0, 1)
    )
    assert one["sums"]["drawn"][0] != other["sums"]["drawn"][0]
    assert one["sums"]["count"] != other["sums"]["count"]


def test_accumulated_pieces_draw_for_themselves():
    history, _ = run(with_optimizer(RANDOM, accumulation_steps=2), 3)
    for metrics in history:
        total, squares = metrics["sums"]["drawn"]
        assert 2 * squares - total**2 > 1e-4  # (a - b)^2 of the two pieces' numbers
    assert len({float(metrics["sums"]["drawn"][0]) for metrics in history}) == 3


def test_a_fresh_state_is_the_same_on_any_mesh_and_really_divided_over_it():
    state = init_sharded(spec_of(on_mesh(CONFIG, 1, 4, 2)), 0)
    assert_same_bits(on_host(state), fresh_state(CONFIG))
    layers = state.params["llm"]["layers"]
    for leaf, parts in (
        (layers["query"], 8), (layers["down"], 8), (state.params["llm"]["embedding"], 8),
        (state.params["llm"]["head"], 8), (state.memory, 8), (layers["mlp_norm"]["scale"], 1),
    ):  # fmt: skip
        assert leaf.addressable_shards[0].data.size * parts == leaf.size
    moments = optax.tree.get(state.optimizer, "mu")["llm"]["layers"]["query"]
    assert moments.sharding.spec == layers["query"].sharding.spec


def test_no_device_computes_more_of_a_fresh_state_than_its_own_part():
    memory = trace_init(spec_of(on_mesh(CONFIG, 1, 4, 2))).lower().compile().memory_analysis()
    # Numbers of a device's own part: computed whole, they would take ten times that.
    assert memory.temp_size_in_bytes < 1.5 * memory.output_size_in_bytes


def test_sizes_that_do_not_fit_the_mesh_are_refused():
    for sizes, words in (
        ((3, 1, 1), "mesh: data=3, fsdp=1, tensor=1 does not fit 8 devices"),
        ((-1, -1, 1), "at most one -1"),
        ((1, 1, 8), "model.kv_heads=2 does not divide by 8"),
        ((4, 1, 2), "data.batch_size=8 does not divide by 16"),  # 4 devices, 4 parts
    ):
        config = with_optimizer(CONFIG, accumulation_steps=4)
        with pytest.raises(UserError, match=words):
            check_mesh(config, DATA.vocabulary, make_mesh(MeshConfig(*sizes)))
    odd = dataclasses.replace(DATA.vocabulary, space=SidSpace((6, 8, 7)), multiple=2)
    config = dataclasses.replace(CONFIG, objective=NextToken(softmax="sids"))
    with pytest.raises(UserError, match=r"codes of all levels, .*=21 does not divide by 2"):
        check_mesh(config, odd, make_mesh(MeshConfig(2, 2, 2)))


def test_baseline_and_sid_encoder_start_from_the_same_decoder():
    without = fresh_state(dataclasses.replace(CONFIG, sid_encoder=None))
    assert_same_bits(fresh_state(CONFIG).params["llm"], without.params["llm"])
    assert without.memory is None and set(without.params) == {"llm"}


def test_norms_and_rows_are_not_decayed():
    # The warm-up starts at rate 0, so the second step is the first that changes anything.
    _, decayed = run(with_optimizer(CONFIG, weight_decay=10.0), 2)
    _, plain = run(CONFIG, 2)  # a hundredth of it
    llm, other = decayed.params["llm"], plain.params["llm"]
    np.testing.assert_allclose(llm["final_norm"]["scale"], other["final_norm"]["scale"], rtol=1e-6)
    np.testing.assert_array_equal(decayed.memory, plain.memory)
    assert np.linalg.norm(llm["embedding"]) < 0.999 * np.linalg.norm(other["embedding"])
    decay = {"weight_decay": 10.0, "embedding_weight_decay": CONFIG.optimizer.weight_decay}
    _, matrices = run(with_optimizer(CONFIG, **decay), 2)
    for name in ("embedding", "head"):  # at a rate of their own, as the others at theirs
        np.testing.assert_array_equal(matrices.params["llm"][name], other[name])
    gates = (state.params["llm"]["layers"]["gate"] for state in (matrices, decayed, plain))
    assert_same_bits(next(gates), next(gates))
    assert np.linalg.norm(llm["layers"]["gate"]) < 0.999 * np.linalg.norm(next(gates))


@pytest.mark.parametrize("kind", ["adam", "row_adam", "adagrad", "sgd"])
def test_every_memory_optimizer_trains_and_keeps_its_state_with_the_rows(kind):
    memory = dataclasses.replace(CONFIG.optimizer.memory, kind=kind, weight_decay=0.01)
    config = dataclasses.replace(CONFIG, objective=Classification())
    config = with_optimizer(config, memory=memory)
    history, state = run(config, 3)
    _, start = run(config, 0)
    assert np.isfinite(history[-1]["loss"])
    assert not np.array_equal(state.memory, start.memory)
    per_row = [x.size for x in jax.tree.leaves(state.memory_optimizer) if x.ndim]
    numbers = state.memory.size
    rows = numbers * CONFIG.sid_encoder.heads // CONFIG.sid_encoder.d_mem
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
    rate = memory_learning_rate(with_optimizer(config, memory=own))
    assert [float(rate(n)) for n in (0, 5, 10, 100)] == pytest.approx([0, 3e-3, 6e-3, 3e-3])


def test_flops_count_loops_and_match_the_formula():
    def scanned(x, weights):
        return jax.lax.scan(lambda x, w: (x @ w, None), x, weights)[0]

    x = jax.ShapeDtypeStruct((5, 7), jnp.float32)
    weights = jax.ShapeDtypeStruct((3, 7, 7), jnp.float32)
    assert matmul_flops(jax.make_jaxpr(scanned)(x, weights)) == 3 * 2 * 5 * 7 * 7
    assert matmul_flops(jax.make_jaxpr(jax.jit(scanned))(x, weights)) == 3 * 2 * 5 * 7 * 7
    chosen = lambda x, w: jax.lax.platform_dependent(  # noqa: E731
        x, w, cpu=lambda x, w: x @ w[0], default=lambda x, w: x @ w[0] @ w[1]
    )
    assert matmul_flops(jax.make_jaxpr(chosen)(x, weights)) == 2 * 2 * 5 * 7 * 7

    def by_kernel(x, w):
        def kernel(x_ref, w_ref, out_ref):
            out_ref[...] = x_ref[...] @ w_ref[...]

        whole = pl.BlockSpec((7, 7), lambda i: (0, 0))
        rows = pl.BlockSpec((8, 7), lambda i: (i, 0))
        out = jax.ShapeDtypeStruct(x.shape, x.dtype)
        grid = (x.shape[0] // 8,)
        called = pl.pallas_call(kernel, out, grid=grid, in_specs=[rows, whole], out_specs=rows)
        return called(x, w) @ w

    kernel = jax.make_jaxpr(by_kernel)(jnp.zeros((24, 7)), jnp.zeros((7, 7)))
    assert 2 * kernel_flops(kernel) == matmul_flops(kernel) == 2 * 2 * 24 * 7 * 7
    unused = jax.make_jaxpr(jax.jit(lambda x, w: jax.jit(lambda y: (y, y @ w))(x @ w)[0]))
    assert matmul_flops(unused(jnp.zeros((5, 7)), jnp.zeros((7, 7)))) == 2 * 5 * 7 * 7
    for fixed in (mean_by_product, halves_swapped):  # nor their gradients

        def with_one(x, w, fixed=fixed):
            return (fixed(x @ w) * (x @ w)).sum()

        both = jax.grad(lambda x, w: ((x @ w) * (x @ w)).sum(), (0, 1))
        counts = [
            matmul_flops(jax.make_jaxpr(function)(x, weights[0]))
            for x, weights in [(jnp.zeros((5, 8)), jnp.zeros((1, 8, 8)))]
            for function in (jax.grad(with_one, (0, 1)), both)
        ]
        assert counts[0] == counts[1] > 0
    counts = []
    for sizes in ((1, 1, 1), (2, 1, 1), (2, 2, 2)):  # the same work, however it is divided
        spec = spec_of(on_mesh(CONFIG, *sizes))
        counts.append(matmul_flops(trace_train_step(spec).jaxpr))
    assert counts[0] == counts[1] == counts[2] > 0
    again = dataclasses.replace(CONFIG, model=dataclasses.replace(CONFIG.model, remat="full"))
    spec = spec_of(again)
    traced = trace_train_step(spec)
    assert matmul_flops(traced.jaxpr) > flops_once(spec, traced) == counts[0]


def test_nothing_in_the_step_has_the_size_of_the_table_but_the_table():
    """Temporary memory does not grow with the rows per table."""
    sizes = []
    for rows in (2**12, 2**18):
        sid_encoder = dataclasses.replace(CONFIG.sid_encoder, rows=rows)
        spec, step = compiled(dataclasses.replace(CONFIG, sid_encoder=sid_encoder))
        memory = step.memory_analysis()
        sizes.append(memory.temp_size_in_bytes)
        table_bytes = 4 * np.prod(spec.memory.shape)
        assert memory.alias_size_in_bytes >= 3 * table_bytes  # rows and moments are in place
    assert sizes[1] <= 1.05 * sizes[0]
