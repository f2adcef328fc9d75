"""Beam search over SIDs: what width, the catalogue's size and the constraint cost."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from prefixmem_jax.benchmarks import torch_peer
from prefixmem_jax.benchmarks.fixtures import DECODERS, one_device_model, random_documents
from prefixmem_jax.benchmarks.timing import machine, median_seconds
from prefixmem_jax.data.batch import Batch
from prefixmem_jax.inference.beam_search import Candidates, beam_search, keep_best
from prefixmem_jax.inference.cached_sid_lm import CachedSidLM
from prefixmem_jax.model_spec import ModelSpec
from prefixmem_jax.semantic_ids.space import SidSpace
from prefixmem_jax.semantic_ids.trie import Trie, TrieLevel
from prefixmem_jax.semantic_ids.vocabulary import Vocabulary

HISTORY = 20  # items in each prompt


def bench_decode(
    decoder: str,
    catalogues: Sequence[int],
    beams: Sequence[int],
    users: int,
    levels: int,
    codes: int,
    repeats: int,
    peer: bool = False,
) -> dict[str, Any]:
    """Times whole decodes of random prompts on one device, and the constraint by itself.

    Args:
      catalogues: numbers of random SIDs of `levels` x `codes` to constrain to.
      peer: also time transformers' beam search without a catalogue (`torch_peer`), first.

    Returns:
      machine, decoder, users (in one batch), levels, codes.
      by_beam: for every width, `unconstrained_seconds` of a batch; `constrained_seconds` and
        `constraint_seconds` (the same search with the log-probabilities given: children, scores,
        top-k) by catalogue size; `constraint_share` of the whole; `users_per_second` constrained.
      tries: by catalogue size, SIDs, bytes and the most children at each level.
      peer: what `torch_peer.time_beam_search` found; peer_ratio: by width, our users per second
        without a catalogue over its.
    """
    length = 1 + levels * HISTORY
    beside = _peer(decoder, users, length, beams, levels, codes, repeats) if peer else None
    spec = one_device_model(decoder, None, users, length, codes, levels=levels)
    vocabulary = spec.vocabulary
    params = jax.jit(partial(_served_params, spec))(jax.random.key(0))
    rng = np.random.default_rng(0)
    tries = {
        size: Trie(rng.integers(0, codes, (size, levels)), (codes,) * levels) for size in catalogues
    }
    on_device = {size: jax.device_put(trie.levels) for size, trie in tries.items()}
    prompts = jax.device_put(random_documents(vocabulary, users, HISTORY, length, rng))
    by_beam = {}
    for width in beams:
        whole = jax.jit(partial(_decode, spec, width))
        alone = jax.jit(partial(_constraint, width, levels))
        logits = jax.random.normal(jax.random.key(0), (users, width, codes))
        calls: dict[Any, Any] = {"unconstrained": partial(whole, params, prompts, None)}
        for size, trie in on_device.items():
            calls["constrained", size] = partial(whole, params, prompts, trie)
            calls["constraint", size] = partial(alone, logits, trie)
        seconds = median_seconds(calls, repeats, f"beam {width}")
        by_beam[str(width)] = _by_kind(seconds, users)
    measured = {
        "machine": machine(),
        "decoder": decoder,
        "users": users,
        "levels": levels,
        "codes": codes,
        "by_beam": by_beam,
        "tries": {
            str(size): {
                "sids": len(trie),
                "bytes": trie.nbytes,
                "widest": [level.widest for level in trie.levels],
            }
            for size, trie in tries.items()
        },
    }
    if beside is not None:
        ratio = {
            width: beside["seconds"][width] / one["unconstrained_seconds"]
            for width, one in by_beam.items()
        }
        measured |= {"peer": beside, "peer_ratio": ratio}
    return measured


def _peer(
    decoder: str,
    users: int,
    length: int,
    beams: Sequence[int],
    levels: int,
    codes: int,
    repeats: int,
) -> dict[str, Any]:
    """`torch_peer.time_beam_search`, while JAX holds nothing on the device."""
    model, text_tokens = DECODERS[decoder]
    vocabulary = Vocabulary(SidSpace((codes,) * levels), text_tokens)
    ranges = [vocabulary.token_range(level) for level in range(1, levels + 1)]
    return torch_peer.time_beam_search(
        model, vocabulary.size, users, length, beams, ranges, repeats
    )


def _served_params(spec: ModelSpec, key: jax.Array) -> dict[str, Any]:
    """Fresh parameters, in the dtypes that inference wants."""
    wanted = spec.replicated()
    return jax.tree.map(lambda x, like: x.astype(like.dtype), spec.init_params(key), wanted)


def _by_kind(seconds: dict[Any, float], users: int) -> dict[str, Any]:
    sizes = [key[1] for key in seconds if key[0] == "constrained"]
    whole = {str(size): seconds["constrained", size] for size in sizes}
    alone = {str(size): seconds["constraint", size] for size in sizes}
    return {
        "unconstrained_seconds": seconds["unconstrained"],
        "constrained_seconds": whole,
        "constraint_seconds": alone,
        "constraint_share": {size: alone[size] / whole[size] for size in whole},
        "users_per_second": {size: users / value for size, value in whole.items()},
    }


def _decode(
    spec: ModelSpec,
    width: int,
    params: Any,
    prompts: Batch,
    trie: list[TrieLevel] | None,
) -> Any:
    return beam_search(CachedSidLM(spec.model(params), None), prompts, width, trie)


def _constraint(
    width: int, levels: int, logits: jax.Array, trie: list[TrieLevel]
) -> tuple[jax.Array, jax.Array]:
    """What `beam_search` does between a model's log-probabilities of one level and the next."""
    users = len(logits)
    scores, nodes = jnp.zeros((users, 1)), jnp.zeros((users, 1), jnp.int32)
    for level in range(levels):
        code, child, valid = trie[level].children(nodes)
        gained = jnp.take_along_axis(logits[:, : scores.shape[1]], code, axis=-1)
        scores = jnp.where(valid, scores[..., None] + gained, -jnp.inf)
        scores, _, (_, _, nodes) = keep_best(scores, Candidates(scores, code, child), width)
    return scores, nodes


def describe(measured: dict[str, Any]) -> str:
    """The measurements as text."""
    lines = [
        f"{measured['machine']['device']}, {measured['decoder']} decoder, "
        f"{measured['users']} users a batch,"
        f" SIDs of {measured['levels']} x {measured['codes']}, histories of {HISTORY} items",
        "  beam        SIDs   decode ms   users/s   constraint ms   share",
    ]
    for width, one in measured["by_beam"].items():
        free = one["unconstrained_seconds"]
        rate = measured["users"] / free
        lines.append(f"  {width:>4s}        none  {1e3 * free:10.1f}  {rate:8.1f}")
        for size, whole in one["constrained_seconds"].items():
            lines.append(
                f"  {width:>4s}  {int(size):>10,d}  {1e3 * whole:10.1f}  "
                f"{one['users_per_second'][size]:8.1f}  "
                f"{1e3 * one['constraint_seconds'][size]:14.2f}  "
                f"{100 * one['constraint_share'][size]:5.1f}%"
            )
    for size, trie in measured["tries"].items():
        per_million = trie["bytes"] / trie["sids"]
        lines.append(f"  trie of {int(size):,} SIDs: {per_million:.1f} MB per million")
    if "peer" in measured:
        peer = measured["peer"]
        lines.append(
            f"  Hugging Face's beam search ({peer['device']}, torch {peer['torch']}, transformers "
            f"{peer['transformers']}), SIDs of any codes:"
        )
        for width, seconds in peer["seconds"].items():
            lines.append(
                f"  {width:>4s}        none  {1e3 * seconds:10.1f}  "
                f"{measured['users'] / seconds:8.1f}   ours has "
                f"{measured['peer_ratio'][width]:.2f} times its users/s"
            )
    return "\n".join(lines)


def panels(measured: dict[str, Any]) -> list[tuple[str, dict[str, float]]]:
    """What the plot shows."""
    return [
        (
            f"decode, beam {width}, ms",
            {
                "no constraint": 1e3 * one["unconstrained_seconds"],
                **{f"{int(s):,} SIDs": 1e3 * v for s, v in one["constrained_seconds"].items()},
                **(
                    {"transformers": 1e3 * measured["peer"]["seconds"][width]}
                    if "peer" in measured
                    else {}
                ),
            },
        )
        for width, one in measured["by_beam"].items()
    ]
