"""Beam search over SIDs: what width, the catalogue's size and the constraint cost."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from prefixmem_jax.benchmarks import fixtures
from prefixmem_jax.benchmarks.timing import machine, median_seconds
from prefixmem_jax.config_groups import DecoderConfig
from prefixmem_jax.data.batch import Batch
from prefixmem_jax.inference.beam_search import Candidates, beam_search, keep_best
from prefixmem_jax.inference.cached_sid_lm import CachedSidLM
from prefixmem_jax.models.decoder import Decoder
from prefixmem_jax.models.sid_lm import SidLM
from prefixmem_jax.semantic_ids.space import SidSpace
from prefixmem_jax.semantic_ids.trie import Trie, TrieLevel
from prefixmem_jax.semantic_ids.vocabulary import Vocabulary

HISTORY = 20  # items in each prompt
DECODERS = {
    "4-layer": DecoderConfig(
        layers=4, d_model=256, d_ff=1024, query_heads=8, kv_heads=4, head_dim=32
    ),
    **{name: model for name, (model, _) in fixtures.DECODERS.items()},
}


def bench_decode(
    decoder: str,
    catalogues: Sequence[int],
    beams: Sequence[int],
    users: int,
    levels: int,
    codes: int,
    repeats: int,
) -> dict[str, Any]:
    """Times whole decodes of random prompts on one device, and the constraint by itself.

    Args:
      catalogues: numbers of random SIDs of `levels` x `codes` to constrain to.

    Returns:
      machine, decoder, users (in one batch), levels, codes.
      by_beam: for every width, `unconstrained_seconds` of a batch; `constrained_seconds` and
        `constraint_seconds` (the same search with the log-probabilities given: children, scores,
        top-k) by catalogue size; `constraint_share` of the whole; `users_per_second` constrained.
      tries: by catalogue size, SIDs, bytes and the most children at each level.
    """
    vocabulary = Vocabulary(SidSpace((codes,) * levels))
    rngs = nnx.Rngs(0)
    llm = Decoder(DECODERS[decoder], vocabulary.size, rngs=rngs)
    model = SidLM(llm, None, vocabulary, rngs=rngs)
    graphdef, params = nnx.split(model, nnx.Param)
    rng = np.random.default_rng(0)
    tries = {
        size: Trie(rng.integers(0, codes, (size, levels)), (codes,) * levels) for size in catalogues
    }
    on_device = {size: jax.device_put(trie.levels) for size, trie in tries.items()}
    length = 1 + levels * HISTORY
    prompts = fixtures.random_documents(vocabulary, users, HISTORY, length, rng)
    prompts = jax.device_put(prompts)
    by_beam = {}
    for width in beams:
        whole = jax.jit(partial(_decode, graphdef, width))
        alone = jax.jit(partial(_constraint, width, levels))
        logits = jax.random.normal(jax.random.key(0), (users, width, codes))
        calls: dict[Any, Any] = {"unconstrained": partial(whole, params, prompts, None)}
        for size, trie in on_device.items():
            calls["constrained", size] = partial(whole, params, prompts, trie)
            calls["constraint", size] = partial(alone, logits, trie)
        seconds = median_seconds(calls, repeats, f"beam {width}")
        by_beam[str(width)] = _by_kind(seconds, users)
    return {
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
    graphdef: nnx.GraphDef,
    width: int,
    params: Any,
    prompts: Batch,
    trie: list[TrieLevel] | None,
) -> Any:
    return beam_search(CachedSidLM(nnx.merge(graphdef, params), None), prompts, width, trie)


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
    return "\n".join(lines)


def panels(measured: dict[str, Any]) -> list[tuple[str, dict[str, float]]]:
    """What the plot shows."""
    return [
        (
            f"decode, beam {width}, ms",
            {
                "no constraint": 1e3 * one["unconstrained_seconds"],
                **{f"{int(s):,} SIDs": 1e3 * v for s, v in one["constrained_seconds"].items()},
            },
        )
        for width, one in measured["by_beam"].items()
    ]
