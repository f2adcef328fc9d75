"""How much host memory an engine takes; for processes of their own, with nothing else in them."""

import dataclasses
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
from models import SID_ENCODER, small_config

from prefixmem_jax.config_groups import DecoderConfig
from prefixmem_jax.data.prepare import prepare_data
from prefixmem_jax.model_spec import ModelSpec
from prefixmem_jax.parallel.mesh import make_mesh
from prefixmem_jax.recommender import recommend
from prefixmem_jax.runs.checkpoint import Checkpoints, memory_part
from prefixmem_jax.runs.run import DataDescription, Run


def build(folder: Path, size: int) -> None:
    """Random parameters, and rows that are all alike: they are quickly written and read."""
    rows = size // (4 * SID_ENCODER.row_width * SID_ENCODER.tables)
    sid_encoder = dataclasses.replace(SID_ENCODER, rows=rows)
    config = small_config(DecoderConfig(layers=1), 0, sid_encoder=sid_encoder)
    data = prepare_data(config.data)
    spec = ModelSpec.create(config, data.vocabulary, make_mesh())
    params = jax.jit(spec.init_params)(jax.random.key(0))
    memory = jnp.full(spec.memory.shape, 0.02, spec.memory.dtype)
    Run(folder).claim(config, DataDescription.of(data, config.data))
    with Checkpoints(folder, keep=1) as checkpoints:
        checkpoints.save(0, {**params, "memory": memory_part(spec, memory)}, {})


def measure(folder: Path) -> tuple[int, int]:
    """Bytes of the arrays, and of the peak of what is resident beyond what was before."""
    run = Run(folder)
    catalog = run.catalog()
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts from here
    engine = run.engine(catalog)
    assert len(recommend(engine, [1, 2, 3], 5)) == 5
    arrays = jax.tree.leaves((engine.params, engine.memory))
    return sum(array.nbytes for array in arrays), resident("VmHWM") - before


def resident(key: str) -> int:
    status = Path("/proc/self/status").read_text()
    return 1024 * int(next(x for x in status.splitlines() if x.startswith(key)).split()[1])


def measure_second(first: Path, second: Path) -> None:
    """Writes bytes of the second's arrays, and of the peak from opening it to recommending."""
    measure(first)  # what the libraries and the compiler take, whatever the size
    sys.stdout.write(" ".join(map(str, measure(second))))
