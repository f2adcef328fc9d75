"""What our train step is measured beside: Hugging Face's Qwen3 of one shape, under torch.compile.

Same parameters in float32, products in the decoder's compute dtype, same recomputation, AdamW,
clipped gradients, and as many tokens, on the same device; of random tokens, a document a row. It
runs in a process of its own, before ours: neither library gives memory back.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import time
from typing import Any

from prefixmem_jax.config_groups import DecoderConfig
from prefixmem_jax.errors import UserError


def measure(
    model: DecoderConfig, vocabulary: int, batch: int, length: int, repeats: int
) -> dict[str, Any]:
    """Median seconds of a step.

    Returns:
      seconds, parameters, torch (version), device.

    Raises:
      UserError: torch is not installed, or it fails.
    """
    if importlib.util.find_spec("torch") is None:
        raise UserError("--peer: torch is not installed; pip install '.[benchmarks]'")
    asked = {
        "model": dataclasses.asdict(model),
        "vocabulary": vocabulary,
        "batch": batch,
        "length": length,
        "repeats": repeats,
    }
    command = [sys.executable, "-m", __name__, json.dumps(asked)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no reason"])[-1]
        raise UserError(f"--peer: torch and transformers do not train here ({reason})")
    return json.loads(done.stdout.splitlines()[-1])


def _main(asked: dict[str, Any]) -> dict[str, Any]:
    import torch

    on_cpu = os.environ.get("JAX_PLATFORMS") == "cpu" or not torch.cuda.is_available()
    device = torch.device("cpu" if on_cpu else "cuda")
    model = _build(asked["model"], asked["vocabulary"], asked["length"]).to(device).train()
    parameters = sum(p.numel() for p in model.parameters())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.1, fused=True)
    compiled = torch.compile(model)
    half = asked["model"]["compute_dtype"] == "bfloat16"
    torch.set_float32_matmul_precision("highest")  # as ours
    shape = (8, asked["batch"], asked["length"])
    tokens = torch.randint(asked["vocabulary"], shape, device=device)

    def step(number: int) -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=half):
            batch = tokens[number % len(tokens)]
            loss = compiled(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if device.type == "cuda":
            torch.cuda.synchronize()

    for number in range(4):
        step(number)
    seconds = []
    for number in range(asked["repeats"]):
        started = time.perf_counter()
        step(number)
        seconds.append(time.perf_counter() - started)
    return {
        "seconds": statistics.median(seconds),
        "parameters": parameters,
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
    }


def _build(shape: dict[str, Any], vocabulary: int, length: int) -> Any:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(
        vocab_size=vocabulary,
        hidden_size=shape["d_model"],
        intermediate_size=shape["d_ff"],
        num_hidden_layers=shape["layers"],
        num_attention_heads=shape["query_heads"],
        num_key_value_heads=shape["kv_heads"],
        head_dim=shape["head_dim"],
        rms_norm_eps=shape["norm_epsilon"],
        rope_parameters={"rope_type": "default", "rope_theta": shape["rope_base"]},
        tie_word_embeddings=shape["tied_embeddings"],
        max_position_embeddings=length,
        use_cache=False,
        attn_implementation="sdpa",
    )
    model = Qwen3ForCausalLM(config)
    if shape["remat"] != "none":
        model.gradient_checkpointing_enable()
    return model


if __name__ == "__main__":
    sys.stdout.write(json.dumps(_main(json.loads(sys.argv[1]))) + "\n")
