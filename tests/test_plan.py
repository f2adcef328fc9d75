"""Plans for pods: what a compiled step holds and moves, on simulated and on described devices."""

import dataclasses
import importlib.util
import json
import math
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import ROOT, prefixmem, python_process
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from prefixmem_jax.config import Config
from prefixmem_jax.config_groups import DataConfig, DecoderConfig, MeshConfig
from prefixmem_jax.errors import UserError
from prefixmem_jax.layers.softmax_head import SoftmaxHead, cross_entropy
from prefixmem_jax.objectives.classification import Classification
from prefixmem_jax.parallel import tpu_flags
from prefixmem_jax.parallel.mesh import make_mesh
from prefixmem_jax.parallel.sharding import gather_over_fsdp, spec
from prefixmem_jax.planning import topology
from prefixmem_jax.planning.hlo import Program
from prefixmem_jax.planning.plan import Plan, describe, plan
from prefixmem_jax.semantic_ids.space import SidSpace
from prefixmem_jax.semantic_ids.vocabulary import Vocabulary
from prefixmem_jax.sid_encoders.prefix_memory import PrefixMemoryConfig
from prefixmem_jax.training.step import check_mesh

needs_tpu_compiler = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="needs the extra [tpu]"
)


VOCABULARY = Vocabulary(SidSpace((256,) * 5), multiple=8)
# Where sizes say nothing, sequences that a TPU's compiler is soon done with.
SHORT = 64


def config_for(
    devices: int, rows: int = 50_000, mesh: MeshConfig | None = None, length: int = 512
) -> Config:
    """Four sequences for each device; layers enough for a loop, as those of LLMs are."""
    return Config(
        "plan",
        data=DataConfig(codebook_sizes=(256,) * 5, sequence_length=length, batch_size=4 * devices),
        model=DecoderConfig(layers=5, d_model=128, d_ff=256, query_heads=4, head_dim=32),
        sid_encoder=PrefixMemoryConfig(rows=rows, d_mem=256),
        mesh=mesh or MeshConfig(),
    )


def test_loops_are_counted():
    mesh = make_mesh(MeshConfig(data=8))

    def step(x, weights):
        def layer(x, w):
            return jnp.tanh(x @ jax.sharding.reshard(w, P())), None

        return jax.lax.scan(layer, x, weights)[0]

    with jax.set_mesh(mesh):
        x = jax.ShapeDtypeStruct((64, 128), jnp.float32, sharding=NamedSharding(mesh, P("data")))
        weights = jax.ShapeDtypeStruct(
            (5, 128, 128), jnp.float32, sharding=NamedSharding(mesh, P(None, "data"))
        )
        program = Program.parse(jax.jit(step).lower(x, weights).compile().as_text())
    (gather,) = program.collectives()
    assert (gather.kind, gather.count, gather.devices) == ("all-gather", 5, 8)
    assert gather.bytes == 5 * 128 * 128 * 4 * 7 // 8
    # Each layer writes and reads the gathered weights at least, and keeps little else.
    weight = 128 * 128 * 4
    assert 5 * 2 * weight < program.memory_bytes() < 5 * 8 * weight


@pytest.fixture(scope="module")
def simulated() -> Plan:
    return plan(config_for(8, mesh=MeshConfig(2, 2, 2)), devices=8)


def test_memory_adds_up_and_shards(simulated):
    sizes = simulated.hbm_bytes
    assert sizes["total"] == sum(sizes[n] for n in sizes if n != "total")
    rows = 16 * 50_000 * 64 * 4 / 8
    assert rows <= sizes["table"] < 1.2 * rows
    assert sizes["temporary"] > 0
    assert simulated.hbm_capacity is simulated.fits is simulated.roofline_seconds is None
    assert simulated.step_seconds is simulated.mfu_bound is None


def test_collectives_say_what_they_serve(simulated):
    by_part = simulated.collective_bytes
    assert sum(by_part.values()) == sum(c["bytes"] for c in simulated.collectives)
    assert min(by_part[n] for n in ("table", "attention", "mlp", "embedding", "head")) > 0
    assert by_part["other"] < 0.01 * sum(by_part.values())
    # Rows out, their gradients back, ids once or both times, as XLA sees that they are the same;
    # sized for 4 of 5 * 4 n-grams and a quarter, of 8 stretches of 256 positions. Half of these,
    # and 2 more, are looked up (of 4 codes 2), and can name half of 4 * 4 n-grams each, and one
    # item more where a stretch begins within one.
    named = 8 * ((128 + 2) * 16 // 2 + 16)
    capacity = int(np.ceil(1.25 * 0.8 * named / 8)) + 8
    exchanged = [8 * capacity * (2 * 64 + ids) * 4 * 7 / 8 for ids in (1, 2)]
    exchange = [c for c in simulated.collectives if c["part"] == "table" and "all-to" in c["kind"]]
    assert sum(c["bytes"] for c in exchange) in exchanged
    # The plan counts by addresses, without the items that stretches begin within.
    by_addresses = int(np.ceil(1.25 * 0.4 * (128 + 2) * 16)) + 8
    assert simulated.table_bytes_gathered == 8 * by_addresses * 64 * 4
    assert "table" in describe(simulated)


def test_no_collective_or_temporary_has_the_tables_size(simulated):
    larger = plan(config_for(8, rows=400_000, mesh=MeshConfig(2, 2, 2)), devices=8)
    assert larger.hbm_bytes["table"] > 7 * simulated.hbm_bytes["table"]
    assert larger.hbm_bytes["temporary"] <= 1.05 * simulated.hbm_bytes["temporary"]
    assert larger.collectives == simulated.collectives
    assert max(c["bytes"] / c["count"] for c in larger.collectives) < larger.hbm_bytes["table"] / 50


@needs_tpu_compiler
def test_a_memory_on_the_host_is_never_on_the_device():
    def planned(rows: int) -> Plan:
        config = config_for(16, rows, MeshConfig(-1, 4, 2, "pinned_host"), length=128)
        # A softmax with something to keep.
        data = dataclasses.replace(config.data, codebook_sizes=(4096,) * 5)
        model = dataclasses.replace(config.model, layers=1)
        return plan(dataclasses.replace(config, model=model, data=data), "v5e:4x4")

    small, large = planned(800_000), planned(30_000_000)
    # Rows, and Adam's two moments.
    assert small.host_bytes > 0.99 * 3 * 16 * 800_000 * 64 * 4 / 16
    assert small.hbm_bytes["table"] == 0
    assert large.hbm_bytes["total"] < large.host_bytes / 10
    assert "in the host's" in describe(small)
    # More than the chip could hold, for which it does nothing twice.
    assert large.host_bytes > large.hbm_capacity and large.fits
    for part in ("mlp", "attention", "loss"):
        assert large.step_seconds[part] == pytest.approx(small.step_seconds[part], rel=0.01)


@needs_tpu_compiler
def test_table_traffic_does_not_grow_with_the_pod_and_nothing_copies_the_table():
    small, large = (
        plan(config_for(devices, rows, MeshConfig(-1, 4, 2), length=128), f"v5e:{shape}")
        for shape, devices, rows in (("4x4", 16, 50_000), ("8x8", 64, 3_200_000))
    )
    assert small.collective_bytes["table"] > 100_000
    assert large.collective_bytes["table"] <= 1.25 * small.collective_bytes["table"]
    more = {n: size - small.hbm_bytes[n] for n, size in large.hbm_bytes.items()}
    assert more["table"] > 150e6 and more["temporary"] < 0.1 * more["table"]
    assert small.fits and small.hbm_capacity == int(15.75 * 2**30)
    assert all(seconds > 0 for seconds in small.roofline_seconds.values())
    assert {"attention", "mlp", "loss", "table", "kernels"} < set(small.step_seconds)
    assert all(seconds > 0 for seconds in small.step_seconds.values())
    assert 0 < small.mfu_bound < 1
    # The exchange of rows waits for its addresses; weights are fetched before they are wanted.
    overlapped = {part: [] for part in ("table", "mlp")}
    for one in small.collectives:
        if one["part"] in overlapped and "all-reduce" not in one["kind"]:
            overlapped[one["part"]].append(one["overlapped"])
    assert not any(overlapped["table"]) and any(overlapped["mlp"])


@needs_tpu_compiler
@pytest.mark.parametrize("chip", ["v5e", "v6e"])
def test_tpus_keep_no_logits_in_float32(chip):
    """Where hidden states come of the same embedding, too, as a v6e turned them for."""
    _, devices = topology.pod_devices(f"{chip}:2x2")
    mesh = make_mesh(MeshConfig(1, 4, 1), devices)
    rows, length, model, outputs = 16, 1024, 2048, 162_304  # the flagship's

    def placed(shape, dtype, *axes):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec(*axes)))

    def loss(stored, tokens, of_prediction):
        weight = gather_over_fsdp(stored, "bfloat16", "vocabulary", None)
        embedded = weight.at[tokens].get(out_sharding=P(("data", "fsdp"), None, None))
        head = SoftmaxHead(weight.T, outputs=outputs - 126)
        return cross_entropy(jnp.tanh(embedded), head, tokens, of_prediction)

    operands = (
        placed((outputs, model), jnp.float32, "vocabulary", "stored_model"),
        placed((rows, length), jnp.int32, "batch", None),
        placed((rows, length), jnp.float32, "batch", None),
    )
    with jax.set_mesh(mesh):
        compiled = jax.jit(jax.value_and_grad(loss, has_aux=True)).lower(*operands).compile()
    program = Program.parse(compiled.as_text())
    kept = [
        one.type for name, _ in program.executed() for one in program.computations[name].values()
    ]
    predictions = rows * length // 4
    assert any(f"bf16[{outputs},{predictions}]" in one for one in kept)
    for size in (f"{outputs},{predictions}", f"{predictions},{outputs}"):
        assert not any(f"f32[{size}]" in one for one in kept)


FLAGS = "LIBTPU_INIT_ARGS"
# A process's first flags are its last.
COLLECTIVES = """
import sys
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from prefixmem_jax.planning import topology
from prefixmem_jax.planning.hlo import Program

_, devices = topology.pod_devices(f"{sys.argv[1]}:2x2")
mesh = Mesh(np.array(devices), ("all",))
def sharded(shape, *spec):
    return jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=NamedSharding(mesh, P(*spec)))
def whole(array):
    return jax.lax.with_sharding_constraint(array, NamedSharding(mesh, P()))
def gathers(weights, x):
    for w in weights:
        x = jnp.tanh(x @ whole(w))
    return x
def loss(weights, x):
    return jnp.square(jnp.tanh(x @ weights[0]) @ weights[1]).mean()
def sums(weights, x):
    return whole(jax.grad(loss)(weights, x))
function, weights, x = {
    "gathers": (gathers, sharded((4, 2048, 2048), None, "all"), sharded((8192, 2048), "all")),
    "sums": (sums, sharded((2, 1024, 1024)), sharded((8192, 1024), "all")),
}[sys.argv[2]]
compiled = jax.jit(function).lower(weights, x).compile()
for one in Program.parse(compiled.as_text()).collectives():
    print(one.kind, one.bytes, one.overlapped)
"""


def collectives_of(*arguments, **environment) -> tuple[set[str], int, list[bool]]:
    """Kinds, all bytes, and of each whether other work goes on beside it."""
    process = python_process(COLLECTIVES, *arguments, **environment)
    written, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    kinds, sent, beside = zip(*(line.split() for line in written.splitlines()), strict=True)
    return set(kinds), sum(map(int, sent)), [one == "True" for one in beside]


@needs_tpu_compiler
@pytest.mark.parametrize("chip", ["v5e", "v6e"])
def test_weights_are_gathered_while_others_are_computed_with(chip):
    """By the flags that runs have too; a v6e's compiler overlaps nothing without them."""
    kinds, _, overlapped = collectives_of(chip, "gathers")
    assert kinds == {"all-gather"}
    assert overlapped == [False, True, True, True]  # nothing comes before the first


@needs_tpu_compiler
@pytest.mark.parametrize("ours", [False, True])
def test_a_v6es_sparse_cores_sum_gradients_beside_other_work(ours):
    """What they send is counted, whoever sends it."""
    kinds, sent, overlapped = collectives_of("v6e", "sums", **({} if ours else {FLAGS: ""}))
    assert kinds == {"all-reduce"} and set(overlapped) == {ours}
    assert sent == 2 * 1024 * 1024 * 2 * 2 * 3 // 4  # a ring of four, bfloat16


def test_flags_are_those_of_the_chip_unless_the_user_has_set_them(tmp_path, monkeypatch):
    monkeypatch.setattr(tpu_flags, "_PCI", tmp_path)

    def after(chip=None):
        tpu_flags.set_tpu_flags(chip)
        return os.environ[FLAGS]

    monkeypatch.delenv(FLAGS, raising=False)
    elsewhere = after()
    assert "async_collective_fusion=true" in elsewhere and "sparse_core" not in elsewhere
    for name, vendor, device in [("0", "0x8086", "0x006f"), ("1", "0x1ae0", "0x0063")]:
        (tmp_path / name).mkdir()
        (tmp_path / name / "vendor").write_text(f"{vendor}\n")
        (tmp_path / name / "device").write_text(f"{device}\n")
    assert after() == elsewhere  # a v5e, and another's device of that number
    (tmp_path / "1" / "device").write_text("0x006f\n")
    assert "sparse_core" in after() and after("v5e") == elsewhere
    assert "sparse_core" in after("v6e")
    for of_user in ("", "--xla_mine=1"):
        monkeypatch.setenv(FLAGS, of_user)
        assert after() == after("v5e") == of_user


def test_a_search_is_planned(simulated):
    """Parameters whole on every device, rows divided as in training, users among the devices."""
    config = config_for(8, mesh=MeshConfig(2, 2, 2))
    searched = plan(config, devices=8, verb="recommend")
    sizes = searched.hbm_bytes
    assert "optimizer" not in sizes and searched.users == 64
    # In training fsdp and tensor divide all but norms and the SID encoder's projection.
    assert 3.5 < sizes["parameters"] / simulated.hbm_bytes["parameters"] < 4
    assert sizes["table"] == simulated.hbm_bytes["table"]
    # Of 8 users half of a prompt's positions, and four times the last of every beam.
    positions = 8 * (-(-(1 + 5 * config.data.max_items) // 2) + 4 * config.evaluation.beam)
    by_addresses = int(np.ceil(1.25 * 0.4 * positions * 16 / 8)) + 8
    assert searched.table_bytes_gathered == 8 * by_addresses * 64 * 4
    assert searched.collective_bytes["table"] > 0
    assert searched.collective_bytes["table"] == sum(searched.collective_bytes.values())
    assert "64 users" in describe(searched)
    with pytest.raises(UserError, match="does not generate SIDs; expected --verb train"):
        plan(dataclasses.replace(config_for(8), objective=Classification()), verb="recommend")


@needs_tpu_compiler
def test_searches_have_plans_for_pods():
    """With the attention kernel that TPUs have."""
    searched = plan(config_for(4, length=SHORT), "v5e:2x2", verb="recommend")
    assert searched.fits and searched.step_seconds["kernels"] > 0
    assert "users/s" in describe(searched)


@needs_tpu_compiler
def test_other_chips_have_plans():
    found = plan(config_for(4, length=SHORT), "v6e:2x2")
    assert found.devices == 4 and found.fits
    assert found.hbm_capacity > 31 * 2**30
    assert len(topology.pod_devices("v5p:2x2x1")[1]) == 4


@needs_tpu_compiler
def test_only_the_data_axis_crosses_slices():
    _, devices = topology.pod_devices("v5e:2x4", slices=2)
    mesh = make_mesh(MeshConfig(-1, 2, 2), devices)
    slices = np.vectorize(lambda device: device.slice_index)(mesh.devices)
    assert mesh.shape == {"data": 4, "fsdp": 2, "tensor": 2}
    assert slices.tolist() == [[[n] * 2] * 2 for n in (0, 0, 1, 1)]
    found = plan(config_for(16, mesh=MeshConfig(-1, 2, 2), length=SHORT), "v5e:2x4", slices=2)
    assert found.devices == 16 and found.fits
    with pytest.raises(UserError, match="data=1 does not divide by the 2 slices"):
        make_mesh(MeshConfig(1, 8, 2), devices)


@needs_tpu_compiler
@pytest.mark.parametrize(
    "pod, sizes", [("v6e:8x8", (4, 16, 1)), ("v6e:4x4", (4, 2, 2)), ("v5p:4x4x4", (8, 8, 1))]
)
def test_mesh_axes_may_be_pieces_of_the_pods(pod, sizes):
    _, devices = topology.pod_devices(pod)
    mesh = make_mesh(MeshConfig(*sizes), devices)
    assert mesh.devices.shape == sizes and set(mesh.devices.flat) == set(devices)
    check_mesh(config_for(math.prod(sizes)), VOCABULARY, mesh)


@needs_tpu_compiler
def test_devices_that_share_rows_are_on_one_machine():
    """A machine of a v5e pod has 2 x 2 chips."""
    mesh = make_mesh(MeshConfig(4, 1, 4), topology.pod_devices("v5e:4x4")[1])
    config = config_for(16)
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, kv_heads=4))
    with pytest.raises(UserError, match="devices that share a row are on several machines"):
        check_mesh(config, VOCABULARY, mesh)


@needs_tpu_compiler
def test_a_step_that_does_not_fit_says_so():
    config = config_for(4, rows=20_000_000, mesh=MeshConfig(-1, 1, 1), length=SHORT)
    found = plan(config, "v5e:2x2")
    assert found.fits is False and found.hbm_bytes["table"] > 15 * 2**30
    assert found.hbm_bytes["total"] > found.hbm_capacity
    assert "DOES NOT FIT" in describe(found)


def test_a_ring_has_the_links_of_the_axes_it_lies_along():
    shares = {4: 0.5, 16: 0.5, 17: 1.0, 256: 1.0, 512: 1.0}
    assert {n: topology.link_share("v5e:16x16", n) for n in shares} == shares
    assert topology.link_share("v5p:4x4x8", 8) == 1 / 3
    assert topology.link_share("v5p:4x4x8", 32) == 2 / 3


def test_arrays_of_an_unknown_type_are_an_error():
    text = "ENTRY %main {\n  %a = q7[8]{0} add(%b, %c)\n}"
    with pytest.raises(ValueError, match="how many bytes has q7"):
        Program.parse(text).memory_bytes()


def test_mistakes_are_one_line(monkeypatch):
    for name in ("v5e", "v9:4x4", "v5e:4x4x4", "v5p:4x4"):
        with pytest.raises(UserError, match="expected one of v5e, v5p, v6e and a shape"):
            topology.pod_devices(name)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install '\.\[tpu\]'"):
        topology.pod_devices("v5e:4x4")


@needs_tpu_compiler
def test_a_pod_that_does_not_exist_is_refused():
    with pytest.raises(UserError, match="not a pod that exists"):
        topology.pod_devices("v5e:3x7")


def test_the_command_writes_the_plan(tmp_path):
    config = ROOT / "configs" / "quickstart" / "prefixmem.py"
    done = prefixmem("plan", config, "--devices", 2, "--json", tmp_path / "plan.json")
    written = json.loads((tmp_path / "plan.json").read_text())
    assert "2 devices (data=2, fsdp=1, tensor=1)" in done.stdout
    assert set(written) == {f.name for f in dataclasses.fields(Plan)}
    assert {"parameters", "table", "optimizer", "temporary", "total"} == set(written["hbm_bytes"])
    done = prefixmem("plan", config, "--topology", "v9:4x4", expect=2)
    assert done.stderr.splitlines()[-1].startswith("prefixmem: --topology v9:4x4: expected one")
    done = prefixmem("plan", config, "--devices", 2, "--slices", 2, expect=2)
    assert "--slices goes with --topology" in done.stderr
