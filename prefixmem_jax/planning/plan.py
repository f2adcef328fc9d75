"""What training and inference need of a pod, found by compiling them for one that is not there."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from prefixmem_jax.config import Config
from prefixmem_jax.data.documents.items import document_length
from prefixmem_jax.data.prepare import data_vocabulary
from prefixmem_jax.errors import UserError
from prefixmem_jax.inference.programs import trace_search
from prefixmem_jax.model_spec import ModelSpec
from prefixmem_jax.parallel.mesh import make_mesh
from prefixmem_jax.parallel.sharding import batch_sharding
from prefixmem_jax.planning.hlo import Collective, Program
from prefixmem_jax.planning.topology import Chip, link_share, mean_hops, pod_devices
from prefixmem_jax.training.flops import kernel_flops, matmul_flops
from prefixmem_jax.training.state import abstract_state
from prefixmem_jax.training.step import (
    abstract_batch,
    check_mesh,
    flops_once,
    trace_train_step,
)

# Parts of the model, by the named scopes that the code opens.
PARTS = ("table", "sid_encoder", "embedding", "attention", "mlp", "head", "loss", "optimizer")


@dataclass(frozen=True)
class Plan:
    """One device's share of one step: a train step, or a search for one batch of users; bytes and
    FLOPs are per step.

    Attributes:
      devices: in the pod; mesh: their axes; users: that one search is for, None for training.
      hbm_bytes: `parameters` (dense), `table` (rows), in training `optimizer` (state of both),
        `temporary` (everything else while the step runs) and their `total`; where the program is
        too large, `temporary` is None and `total` what the compiler asked for, if it said so.
      host_bytes: of what lies in the host's memory (`mesh.memory_kind`), for this device.
      hbm_capacity: what the compiler may use; None for CPU devices.
      fits: whether it compiled within the capacity; None for CPU devices.
      flops: of matrix products, recomputation included.
      collectives: largest first: `kind`, `bytes` sent by a device, `part` of the model, `count`,
        `devices` that exchange, and whether it is `overlapped` by other work.
      collective_bytes: the same, summed by part.
      table_bytes_gathered: row bytes that a device reads from its part of the table.
      roofline_seconds: least time of `compute`, `memory` and `network`, each at the chip's
        published peak and perfectly overlapped; None for CPU devices.
      step_seconds: what the compiler expects of each part of the model, without what the host does
        with rows in its memory; beside it what it says nothing of: `kernels` at the chip's peak,
        and the `collectives` that nothing overlaps, at their links' peak. None for CPU devices.
      mfu_bound: FLOPs without recomputation and without kernels', at the chip's peak, as a share
        of all of that.
    """

    devices: int
    mesh: dict[str, int]
    users: int | None
    hbm_bytes: dict[str, int | None]
    host_bytes: int
    hbm_capacity: int | None
    fits: bool | None
    flops: float
    collectives: list[dict[str, Any]]
    collective_bytes: dict[str, int]
    table_bytes_gathered: int
    roofline_seconds: dict[str, float] | None
    step_seconds: dict[str, float] | None
    mfu_bound: float | None

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def plan(
    config: Config,
    topology: str | None = None,
    devices: int | None = None,
    slices: int = 1,
    verb: Literal["train", "recommend"] = "train",
    say: Callable[[str], None] = lambda text: None,
) -> Plan:
    """Compiles a whole step for a TPU pod, or for this process's CPU devices.

    Args:
      verb: `recommend` plans the search for one batch of users (`inference.programs`).
      topology: such as `v5e:16x16`, see `planning.topology`; `slices` of them.
      devices: number of local devices to use instead.
      say: is told when it begins to compile.
    """
    chip = None
    if topology is not None:
        chip, pod = pod_devices(topology, slices)
    else:
        pod = jax.devices()[:devices]
        if len(pod) < (devices or 1):
            raise UserError(f"--devices {devices}: JAX has {len(pod)} in this process")
    planned = (_training if verb == "train" else _search)(config, pod)
    spec, traced, sizes = planned.spec, planned.traced, dict(planned.sizes)
    flops, mesh = matmul_flops(traced.jaxpr) / len(pod), spec.mesh
    shape = dict(zip(mesh.axis_names, mesh.devices.shape, strict=True))
    say("compiling; this can take minutes ...")
    try:
        options = spec.compiler_options if verb == "train" else None
        compiled = traced.lower().compile(options)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        sizes |= {"temporary": None, "total": _bytes_asked_for(str(error))}
        capacity = chip.hbm_bytes if chip else None
        cannot = (capacity, False, flops, [], {}, 0, None, None, None)
        return Plan(len(pod), shape, planned.users, sizes, planned.host_bytes, *cannot)
    memory = compiled.memory_analysis()
    total = (
        memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        - memory.alias_size_in_bytes
        + memory.temp_size_in_bytes
        + memory.generated_code_size_in_bytes
    )
    if chip is None:  # CPU devices have no other memory
        total -= planned.host_bytes
    sizes |= {"temporary": total - sum(sizes.values()), "total": total}
    program = Program.parse(compiled.as_text())
    collectives = program.collectives()
    by_part: dict[str, int] = dict.fromkeys(PARTS, 0)
    for collective in collectives:
        part = _part(collective.scope)
        by_part[part] = by_part.get(part, 0) + collective.bytes
    gathered = 0
    if spec.table is not None:
        table = spec.table if verb == "train" else spec.table.of_beams
        gathered = table.bytes_served(planned.looked_up // len(pod), len(pod))
    seconds = mfu = None
    if chip is not None:
        kernels = kernel_flops(traced.jaxpr) / len(pod)
        seconds = _step_seconds(chip, topology, kernels, program, collectives)
        mfu = planned.flops_once() / len(pod) / chip.flops / sum(seconds.values())
    return Plan(
        devices=len(pod),
        mesh=shape,
        users=planned.users,
        hbm_bytes=sizes,
        host_bytes=planned.host_bytes,
        hbm_capacity=chip and chip.hbm_bytes,
        fits=None if chip is None else total <= chip.hbm_bytes,
        flops=flops,
        collectives=[_described(collective) for collective in collectives],
        collective_bytes=by_part,
        table_bytes_gathered=gathered,
        roofline_seconds=chip and _roofline(chip, topology, flops, program, collectives),
        step_seconds=seconds,
        mfu_bound=mfu,
    )


class _Planned(NamedTuple):
    """What is to be compiled.

    Attributes:
      sizes, host_bytes: of a device, as in `Plan`, before it is compiled.
      looked_up: memory addresses of a step, on all devices.
      flops_once: counts the FLOPs of a step that computes nothing twice, without its kernels'; it
        may have to trace such a step.
    """

    spec: ModelSpec
    traced: jax.stages.Traced
    users: int | None
    sizes: dict[str, int]
    host_bytes: int
    looked_up: int
    flops_once: Callable[[], int]


def _training(config: Config, pod: Sequence[jax.Device]) -> _Planned:
    mesh = make_mesh(config.mesh, pod)
    vocabulary = data_vocabulary(config.data)
    check_mesh(config, vocabulary, mesh)
    spec = ModelSpec.create(config, vocabulary, mesh)
    state, batch = abstract_state(spec), abstract_batch(spec)
    sizes = {
        "parameters": _device_bytes(state.params),
        "table": _device_bytes(state.memory),
        "optimizer": _device_bytes((state.optimizer, state.memory_optimizer, state.step)),
    }
    looked_up = 0
    if spec.table is not None:
        with jax.set_mesh(mesh):
            addresses = jax.eval_shape(
                lambda params, batch: spec.model(params).memory_addresses(batch), spec.params, batch
            )
        looked_up = sum(x.size for x in addresses[:2] if x is not None)
    traced = trace_train_step(spec)
    host = _device_bytes((state.memory, state.memory_optimizer), on_host=True)
    return _Planned(spec, traced, None, sizes, host, looked_up, lambda: flops_once(spec, traced))


def _search(config: Config, pod: Sequence[jax.Device]) -> _Planned:
    if not config.objective.generates:
        raise UserError(f"plan: {config.name} does not generate SIDs; expected --verb train")
    spec = ModelSpec.create(config, data_vocabulary(config.data), make_mesh(devices=pod))
    sizes = {
        "parameters": _device_bytes(spec.replicated()),
        "table": _device_bytes(spec.memory),
    }
    traced, users = trace_search(spec)
    looked_up, levels = 0, spec.vocabulary.levels
    if spec.table is not None:
        length = document_length(levels, config.data.max_items)
        looked_up = _addresses(spec, users, length)
        looked_up += (levels - 1) * _addresses(spec, users * config.evaluation.beam, levels, last=1)
    return _Planned(
        spec,
        traced,
        users,
        sizes,
        _device_bytes(spec.memory, on_host=True),
        looked_up,
        lambda: matmul_flops(traced.jaxpr) - kernel_flops(traced.jaxpr),
    )


def _addresses(spec: ModelSpec, rows: int, length: int, last: int | None = None) -> int:
    """Memory addresses of so many rows of tokens, as the SID encoder's `addresses`."""
    tokens = jax.ShapeDtypeStruct((rows, length), jnp.int32, sharding=batch_sharding(spec.mesh))
    with jax.set_mesh(spec.mesh):
        return jax.eval_shape(
            lambda params, tokens: spec.model(params).addresses(tokens, tokens, last),
            spec.params,
            tokens,
        ).size


def _device_bytes(tree: Any, on_host: bool = False) -> int:
    """Of one device's share of what lies on the devices, or in their hosts' memory."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
        if (leaf.sharding.memory_kind == "pinned_host") == on_host
    )


def _bytes_asked_for(message: str) -> int | None:
    found = re.search(r"(?:required[^(]*\(|Used )([\d.]+)([KMGT])", message)
    return found and int(float(found[1]) * 2 ** (10 * (1 + "KMGT".index(found[2]))))


def _part(scope: str) -> str:
    named = [word for word in re.findall(r"\w+", scope) if word in PARTS]
    return named[-1] if named else "other"


def _described(collective: Collective) -> dict[str, Any]:
    return {
        "kind": collective.kind,
        "bytes": collective.bytes,
        "part": _part(collective.scope),
        "count": collective.count,
        "devices": collective.devices,
        "overlapped": collective.overlapped,
    }


def _roofline(
    chip: Chip, topology: str, flops: float, program: Program, collectives: list[Collective]
) -> dict[str, float]:
    return {
        "compute": flops / chip.flops,
        "memory": program.memory_bytes() / chip.hbm_bandwidth,
        "network": sum(_network_seconds(chip, topology, c) for c in collectives),
    }


def _network_seconds(chip: Chip, topology: str, collective: Collective) -> float:
    """Of one collective at its links' peak.

    An all-to-all passes through several links: its bytes count once for each, on average.
    """
    if collective.kind == "all-to-all":
        return collective.bytes * mean_hops(topology) / chip.network_bandwidth
    share = link_share(topology, collective.devices)
    return collective.bytes / (share * chip.network_bandwidth)


def _step_seconds(
    chip: Chip,
    topology: str,
    kernels: float,
    program: Program,
    collectives: list[Collective],
) -> dict[str, float]:
    """See `Plan`."""
    seconds: dict[str, float] = {}
    for scope, cycles in program.cycles():
        part = _part(scope)
        seconds[part] = seconds.get(part, 0.0) + cycles / chip.clock
    alone = [c for c in collectives if not c.overlapped]
    return seconds | {
        "kernels": kernels / chip.flops,
        "collectives": sum(_network_seconds(chip, topology, c) for c in alone),
    }


def describe(plan: Plan) -> str:
    """The plan as text for people."""
    mesh = ", ".join(f"{axis}={size}" for axis, size in plan.mesh.items())
    step = "one step" if plan.users is None else f"a search for {plan.users} users on all of them"
    lines = [f"{plan.devices} devices ({mesh}); each, in {step}:", ""]
    for name, size in plan.hbm_bytes.items():
        lines.append(f"  memory, {name:11s} {_bytes(size)}")
    if plan.host_bytes:
        lines.append(f"  in the host's       {_bytes(plan.host_bytes)}, whose time is not counted")
    if plan.hbm_capacity is not None:
        verdict = "fits" if plan.fits else "DOES NOT FIT"
        lines.append(f"  {verdict} in {_bytes(plan.hbm_capacity).strip()}")
    lines += ["", f"  matrix products     {plan.flops / 1e9:8,.1f} GFLOP"]
    if plan.hbm_bytes["temporary"] is None:
        lines.append("  (the rest is known only of a program that fits)")
        return "\n".join(lines)
    lines += [
        f"  table rows read     {_bytes(plan.table_bytes_gathered)}",
        "",
        "  sent over the network:",
    ]
    grouped: dict[tuple[str, str, bool], list[int]] = {}
    for collective in plan.collectives:
        key = (collective["part"], collective["kind"], collective["overlapped"])
        one = grouped.setdefault(key, [0, 0])
        one[0] += collective["bytes"]
        one[1] += collective["count"]
    for key, (sent, count) in sorted(grouped.items(), key=lambda item: -item[1][0]):
        part, kind, overlapped = key
        beside = ", overlapped" if overlapped else ""
        lines.append(f"    {part:10s} {kind:19s} {_bytes(sent)}  in {count}{beside}")
    if not grouped:
        lines.append("    nothing")
    if plan.roofline_seconds is not None:
        lines += ["", "  least time at the chip's peak rates:"]
        slowest = max(plan.roofline_seconds, key=plan.roofline_seconds.get)
        for name, seconds in plan.roofline_seconds.items():
            mark = "<- bounds the step" if name == slowest else ""
            lines.append(f"    {name:30s} {seconds * 1e3:8.1f} ms {mark}".rstrip())
        lines += [
            "",
            "  a step, by the compiler; kernels and collectives at peak rates:",
        ]
        for name, seconds in sorted(plan.step_seconds.items(), key=lambda item: -item[1]):
            lines.append(f"    {name:30s} {seconds * 1e3:8.1f} ms")
        total = sum(plan.step_seconds.values())
        share = f"MFU at most {100 * plan.mfu_bound:.0f}%"
        lines.append(f"    {'all':30s} {total * 1e3:8.1f} ms, {share}")
        if plan.users is not None:
            lines.append(f"    at most {plan.users / total:,.0f} users/s")
    return "\n".join(lines)


def _bytes(size: int | None) -> str:
    """In the unit that suits the size."""
    if size is None:
        return "unknown"
    power = min(max(size.bit_length() - 1, 0) // 10, 3)
    return f"{size / 2 ** (10 * power):8.2f} {('B', 'KiB', 'MiB', 'GiB')[power]}"
