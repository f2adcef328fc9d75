"""What we are measured beside: Hugging Face's Qwen3 of one shape, on the device that JAX has.

It runs in a process of its own, before ours: neither library gives memory back.
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
from collections.abc import Callable, Sequence
from typing import Any

import jax

from prefixmem_jax.config_groups import DecoderConfig
from prefixmem_jax.errors import UserError


def time_step(
    model: DecoderConfig, vocabulary: int, batch: int, length: int, repeats: int
) -> dict[str, Any]:
    """A train step under torch.compile: same parameters in float32, products in the decoder's
    compute dtype, same recomputation, AdamW, clipped gradients; of random tokens, a document a row.

    Returns:
      seconds (median), parameters, torch and transformers (versions), device.

    Raises:
      UserError: torch or transformers are not installed, fail, or find another device than JAX.
    """
    return _in_its_process(
        "step", model, vocabulary=vocabulary, batch=batch, length=length, repeats=repeats
    )


def time_beam_search(
    model: DecoderConfig,
    vocabulary: int,
    users: int,
    length: int,
    beams: Sequence[int],
    levels: Sequence[tuple[int, int]],
    repeats: int,
) -> dict[str, Any]:
    """`generate` with beams, weights in the decoder's compute dtype: every level's codes alone may
    come next, as in our search without a catalogue.

    Args:
      length: tokens of a user's prompt, which are random.
      levels: first token of each level's codes, and the one after its last.

    Returns:
      seconds: medians by number of beams, of a batch of users; the rest as `time_step`.

    Raises:
      UserError: as `time_step`.
    """
    return _in_its_process(
        "beam_search",
        model,
        vocabulary=vocabulary,
        users=users,
        length=length,
        beams=list(beams),
        levels=list(levels),
        repeats=repeats,
    )


def _in_its_process(task: str, model: DecoderConfig, **asked: Any) -> dict[str, Any]:
    for library in ("torch", "transformers"):
        if importlib.util.find_spec(library) is None:
            raise UserError(f"--peer: {library} is not installed; pip install '.[benchmarks]'")
    asked |= {"task": task, "model": dataclasses.asdict(model)}
    command = [sys.executable, "-m", __name__, json.dumps(asked)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no reason"])[-1]
        raise UserError(f"--peer: torch and transformers do not run here ({reason})")
    found = json.loads(done.stdout.splitlines()[-1])
    ours = jax.devices()[0]
    if (ours.platform == "gpu") != (found["device"] != "cpu"):
        raise UserError(f"--peer: JAX has {ours.device_kind}, torch {found['device']}")
    return found


def _main(asked: dict[str, Any]) -> dict[str, Any]:
    import torch
    import transformers

    on_cpu = os.environ.get("JAX_PLATFORMS") == "cpu" or not torch.cuda.is_available()
    device = torch.device("cpu" if on_cpu else "cuda")
    torch.set_float32_matmul_precision("highest")  # as ours
    found = {"step": _step, "beam_search": _beam_search}[asked["task"]](asked, device)
    return found | {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "device": "cpu" if on_cpu else torch.cuda.get_device_name(),
    }


def _step(asked: dict[str, Any], device: Any) -> dict[str, Any]:
    import torch

    model = build(asked["model"], asked["vocabulary"], asked["length"]).to(device).train()
    if asked["model"]["remat"] != "none":
        model.gradient_checkpointing_enable()
    parameters = sum(p.numel() for p in model.parameters())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.1, fused=True)
    compiled = torch.compile(model)
    half = asked["model"]["compute_dtype"] == "bfloat16"
    shape = (8, asked["batch"], asked["length"])
    tokens = torch.randint(asked["vocabulary"], shape, device=device)

    def step(number: int) -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=half):
            batch = tokens[number % len(tokens)]
            loss = compiled(input_ids=batch, labels=batch, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if device.type == "cuda":
            torch.cuda.synchronize()

    return {"seconds": _median_seconds(step, 4, asked["repeats"]), "parameters": parameters}


def _beam_search(asked: dict[str, Any], device: Any) -> dict[str, Any]:
    import torch

    dtype = getattr(torch, asked["model"]["compute_dtype"])
    longest = asked["length"] + len(asked["levels"])
    model = build(asked["model"], asked["vocabulary"], longest).to(device, dtype).eval()
    shape = (8, asked["users"], asked["length"])
    prompts = torch.randint(asked["vocabulary"], shape, device=device)

    def seconds(beams: int) -> float:
        def search(number: int) -> None:
            best_sids(model, prompts[number % 8], beams, asked["levels"])[1].cpu()

        return _median_seconds(search, 2, asked["repeats"])

    return {"seconds": {str(beams): seconds(beams) for beams in asked["beams"]}}


def best_sids(
    model: Any, prompts: Any, beams: int, levels: Sequence[tuple[int, int]]
) -> tuple[Any, Any]:
    """The best SIDs after prompts, by transformers' own beam search.

    Args:
      prompts: tokens, int64 [users, length].
      levels: first token of each level's codes, and the one after its last.

    Returns:
      Tokens int64 [users, beams, levels], best first, and sums of the codes' log-probabilities
      among those of their levels, [users, beams].
    """
    import torch

    users, length = prompts.shape

    def of_one_level(so_far: Any, scores: Any) -> Any:
        first, stop = levels[so_far.shape[1] - length]
        allowed = torch.full_like(scores, -torch.inf)
        allowed[:, first:stop] = scores[:, first:stop].log_softmax(-1)
        return allowed

    with torch.no_grad():
        found = model.generate(
            prompts,
            attention_mask=torch.ones_like(prompts),
            num_beams=beams,
            num_return_sequences=beams,
            max_new_tokens=len(levels),
            do_sample=False,
            length_penalty=0.0,
            logits_processor=[of_one_level],
            return_dict_in_generate=True,
            output_scores=True,
            pad_token_id=0,
        )
    tokens = found.sequences[:, length:].reshape(users, beams, -1)
    return tokens, found.sequences_scores.reshape(users, beams)


def _median_seconds(call: Callable[[int], None], warm_up: int, repeats: int) -> float:
    for number in range(warm_up):
        call(number)
    seconds = []
    for number in range(repeats):
        started = time.perf_counter()
        call(number)
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds)


def build(shape: dict[str, Any], vocabulary: int, longest: int) -> Any:
    """Qwen3 of a `DecoderConfig`'s shape, with random weights, for sequences up to `longest`."""
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
        max_position_embeddings=longest,
        bos_token_id=None,
        eos_token_id=None,
        attn_implementation="sdpa",
    )
    return Qwen3ForCausalLM(config)


if __name__ == "__main__":
    sys.stdout.write(json.dumps(_main(json.loads(sys.argv[1]))) + "\n")
