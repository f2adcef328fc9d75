"""What starting a run takes, of Hugging Face's files or of its own: host memory, and seconds."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

from prefixmem_jax.benchmarks.timing import in_its_own_process, machine
from prefixmem_jax.config import Config
from prefixmem_jax.config_groups import DataConfig, DecoderConfig, InitConfig
from prefixmem_jax.data.prepare import data_vocabulary
from prefixmem_jax.files import write_json
from prefixmem_jax.hf.export import Parameters, write_weights
from prefixmem_jax.hf.families import huggingface_config, read_folder
from prefixmem_jax.hf.mapping import Architecture
from prefixmem_jax.model_spec import ModelSpec
from prefixmem_jax.models.decoder import Decoder
from prefixmem_jax.parallel.mesh import make_mesh
from prefixmem_jax.runs.checkpoint import Checkpoints
from prefixmem_jax.sid_encoders.prefix_memory import PrefixMemoryConfig
from prefixmem_jax.training.initialise import parts_of_folder
from prefixmem_jax.training.parts import abstract_parts, from_parts, to_parts
from prefixmem_jax.training.state import abstract_state

SHARDS, WIDTH, VOCABULARY = 3, 1024, 32_768


def bench_load(size: int) -> dict[str, Any]:
    """Loads a random Qwen3-shaped checkpoint of about `size` bytes, and a run's state of as many.

    Returns:
      machine; checkpoint, largest_shard, arrays: bytes of the files, of the largest of them, and
      of the parameters made of them, SID tokens added.
      peak: most bytes resident at any time, beyond what was before.
      over_shard: (peak - arrays) / largest_shard.
      state, state_peak: bytes of a run's parameters, table and both's moments, and of the peak.
      over_state: state_peak / state.
      state_held_up, state_saved, state_read: seconds that saving it held up its caller, until it
        was in files, and of reading it back.
    """
    with tempfile.TemporaryDirectory() as folder:
        files = _write_checkpoint(Path(folder), size)
        arrays, peak, _ = in_its_own_process(_load, folder)
    with tempfile.TemporaryDirectory() as folder:
        held_up, saved = _write_state(Path(folder), size)
        state, state_peak, state_read = in_its_own_process(_go_on, folder, size)
    largest = max(files)
    return {
        "machine": machine(),
        "checkpoint": sum(files),
        "largest_shard": largest,
        "arrays": arrays,
        "peak": peak,
        "over_shard": (peak - arrays) / largest,
        "state": state,
        "state_peak": state_peak,
        "over_state": state_peak / state,
        "state_held_up": held_up,
        "state_saved": saved,
        "state_read": state_read,
    }


def _write_checkpoint(folder: Path, size: int) -> list[int]:
    """Sizes of the files."""
    layer_bytes = 4 * (3 * WIDTH * 3 * WIDTH + 2 * WIDTH * 16 * 128 + 2 * WIDTH * 8 * 128)
    layers = max(1, round((size - 4 * VOCABULARY * WIDTH) / layer_bytes))
    decoder = DecoderConfig(layers, WIDTH, 3 * WIDTH, 16, 8, 128, tied_embeddings=True)
    config = huggingface_config(decoder, VOCABULARY, 1024)
    write_json(folder / "config.json", config.to_dict())
    model = nnx.eval_shape(lambda: Decoder(decoder, VOCABULARY, rngs=nnx.Rngs(0)))
    shapes = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    rng = np.random.default_rng(0)
    dense = {"llm": jax.tree.map(lambda leaf: rng.random(leaf.shape, np.float32), shapes)}
    write_weights(folder, Parameters(Architecture(decoder), dense), None, size // SHARDS)
    return [path.stat().st_size for path in folder.glob("*.safetensors")]


def _load(folder: str) -> tuple[int, int, float]:
    """Of a run's `llm` parameters, see `_measured`."""
    described = read_folder(folder)
    data = DataConfig(codebook_sizes=(2048,) * 4, text_tokens=described.text_tokens)
    config = Config("load", data=data, model=described.decoder)
    mesh = make_mesh(devices=jax.devices()[:1])
    spec = ModelSpec.create(config, data_vocabulary(data), mesh)
    init = InitConfig(from_huggingface=folder)
    return _measured(lambda: parts_of_folder(spec, init, ["llm"], seed=0))


def _state_spec(size: int) -> ModelSpec:
    """Of a model with Adam's moments of all; its table is most of it."""
    memory = PrefixMemoryConfig(target_levels=(3, 4), orders=3)
    by_row = 3 * 4 * memory.tables * memory.row_width
    width = WIDTH // 4
    decoder = DecoderConfig(1, width, 3 * width, 4, 4, 64)
    data = DataConfig(codebook_sizes=(2048,) * 4)
    sid_encoder = replace(memory, rows=max(size // by_row, 1000))
    config = Config("load", data=data, model=decoder, sid_encoder=sid_encoder)
    mesh = make_mesh(devices=jax.devices()[:1])
    return ModelSpec.create(config, data_vocabulary(data), mesh)


def _write_state(folder: Path, size: int) -> tuple[float, float]:
    """Seconds that saving random numbers held up its caller, and until they were written."""
    spec, rng = _state_spec(size), np.random.default_rng(0)

    def filled(leaf: jax.ShapeDtypeStruct) -> jax.Array:
        numbers = rng.random(leaf.shape, np.float32).astype(leaf.dtype)  # which do not compress
        return jax.device_put(numbers, leaf.sharding)

    parts = to_parts(spec, jax.tree.map(filled, abstract_state(spec)))
    with Checkpoints(folder, keep=1) as checkpoints:
        begun = time.perf_counter()
        checkpoints.save(0, parts, {})
        held_up = time.perf_counter() - begun
    return held_up, time.perf_counter() - begun


def _go_on(folder: str, size: int) -> tuple[int, int, float]:
    """Of a run's state, see `_measured`."""
    spec = _state_spec(size)
    with Checkpoints(Path(folder)) as checkpoints:
        return _measured(lambda: from_parts(checkpoints.load(abstract_parts(spec), spec, 0)))


def _measured(load: Callable[[], Any]) -> tuple[int, int, float]:
    """Bytes of the arrays that it gives, the peak of resident memory on the way there, seconds."""
    jax.block_until_ready(jax.numpy.zeros(8))
    before = _resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts from here
    begun = time.perf_counter()
    loaded = jax.block_until_ready(load())
    seconds = time.perf_counter() - begun
    arrays = sum(leaf.nbytes for leaf in jax.tree.leaves(loaded))
    return arrays, _resident("VmHWM") - before, seconds


def _resident(key: str) -> int:
    status = Path("/proc/self/status").read_text()
    return 1024 * int(next(x for x in status.splitlines() if x.startswith(key)).split()[1])


def describe(measured: dict[str, Any]) -> str:
    """The measurements as text."""
    gigabytes = {key: f"{measured[key] / 1e9:.2f} GB" for key in _BYTES}
    return "\n".join(
        [
            f"{gigabytes['checkpoint']} in {SHARDS} or more files, the largest "
            f"{gigabytes['largest_shard']}",
            f"  parameters with SID tokens added {gigabytes['arrays']}",
            f"  peak of host memory {gigabytes['peak']}: the parameters and "
            f"{measured['over_shard']:.2f} x the largest file",
            f"going on from a run's own checkpoint of {gigabytes['state']}, optimizer included",
            f"  peak of host memory {gigabytes['state_peak']}: {measured['over_state']:.2f} x that",
            f"  saving it: held up {measured['state_held_up']:.2f} s, in files after "
            f"{measured['state_saved']:.1f} s; read in {measured['state_read']:.1f} s",
        ]
    )


def panels(measured: dict[str, Any]) -> list[tuple[str, dict[str, float]]]:
    """What the plot shows."""
    return [("host memory, GB", {key: measured[key] / 1e9 for key in _BYTES})]


_BYTES = ("checkpoint", "largest_shard", "arrays", "peak", "state", "state_peak")
