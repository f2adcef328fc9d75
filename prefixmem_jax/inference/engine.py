"""A trained run, ready to recommend and to be evaluated, on every device of this machine."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from tqdm import tqdm

from prefixmem_jax.config_files import load_config
from prefixmem_jax.data.prepare import PreparedData, prepare_data
from prefixmem_jax.data.sequences import Rows, batches, example_rows, prompt_rows
from prefixmem_jax.data.splits import Example
from prefixmem_jax.inference.beam_search import Beams, beam_search
from prefixmem_jax.inference.sampling import generate
from prefixmem_jax.inference.cached_sid_lm import CachedSidLM
from prefixmem_jax.errors import UserError
from prefixmem_jax.parallel.mesh import AXES, make_mesh
from prefixmem_jax.parallel.sharding import row_spec
from prefixmem_jax.runs.checkpoint import Checkpoints
from prefixmem_jax.training.step import Trainer, TrainState

MANY_USERS = 2000


class Recommendation(NamedTuple):
    """An item, its title and SID, and the log-probability of the SID."""

    item: int
    title: str | None
    sid: tuple[int, ...]
    score: float


class Recommender:
    """A run's model: dense parameters on every device, the memory's rows spread over them.

    Users are divided among the devices; each searches for its own.
    """

    def __init__(self, trainer: Trainer, state: TrainState, data: PreparedData):
        """Takes a state on the trainer's mesh, whose dense parameters are on every device."""
        self.trainer = trainer
        self.config = trainer.config
        self.data = data
        self.mesh = trainer.mesh
        self.state = state
        everywhere = NamedSharding(self.mesh, P())
        self._params = jax.device_put(state.params, everywhere)
        self._trie = jax.device_put(data.catalog.trie.levels, everywhere)
        self._by_user = NamedSharding(self.mesh, P(AXES))
        self._rank = jax.jit(self._ranks)
        self._search = jax.jit(self._beams, static_argnames="beams")

    @classmethod
    def load(
        cls,
        run: str | Path,
        data: PreparedData | None = None,
        devices: Sequence[jax.Device] | None = None,
    ) -> Recommender:
        """Reads a run's config and newest checkpoint.

        Args:
          data: other data than the run's config names, or the same where the caller has it.
          devices: default: all of this process.

        Raises:
          UserError: not a run directory, no checkpoint, or a stage that cannot recommend.
        """
        run = Path(run)
        if not (run / "config.json").is_file():
            raise UserError(f"{run}: not a run directory (it has no config.json)")
        config = load_config(run / "config.json")
        if config.objective != "next_token":
            raise UserError(
                f"{run}: a {config.objective} run has no decoder; name a next_token run"
            )
        data = data or prepare_data(config.data)
        mesh = make_mesh(devices=jax.local_devices() if devices is None else devices)
        trainer = Trainer.create(config, data.catalog.space, mesh)
        with Checkpoints(run, trainer) as checkpoints:
            _, state = checkpoints.restore()
        return cls(trainer, state, data)

    def _beams(
        self,
        params: dict[str, Any],
        memory: jax.Array | None,
        prompts: Rows,
        trie: list | None,
        excluded: jax.Array | None,
        *,
        beams: int,
    ) -> Beams:
        def local(params, memory, prompts, trie, excluded):
            model = CachedSidLM(self.trainer.model(params), memory)
            return beam_search(model, prompts, beams, trie, excluded)

        by_user = P(AXES)
        return jax.shard_map(
            local,
            mesh=self.mesh,
            in_specs=(P(), row_spec(), by_user, P(), by_user),
            out_specs=by_user,
        )(params, memory, prompts, trie, excluded)

    def search(
        self,
        histories: Sequence[np.ndarray],
        beams: int,
        constrained: bool,
        progress: str = "",
        exclude_seen: bool = False,
    ) -> tuple[np.ndarray, np.ndarray]:
        """The best next SIDs after each history.

        Users of similar length are searched together; each such length is compiled once.

        Args:
          exclude_seen: leave out SIDs of which the history holds every item (constrained only).

        Returns:
          codes int32 [users, beams, levels] and scores float32 [users, beams], best first; see
          `decoding.beam_search.Beams`.
        """
        catalog = self.data.catalog
        codes = np.full((len(histories), beams, catalog.space.levels), -1, np.int32)
        scores = np.full((len(histories), beams), -np.inf, np.float32)
        size = self._batch_size(len(histories))
        with tqdm(total=len(histories), desc=progress, unit="user", disable=not progress) as bar:
            for length, users in self._by_length(histories):
                chosen = [histories[user] for user in users]
                rows = prompt_rows(catalog, chosen, length)
                if exclude_seen:
                    rows["excluded"] = seen_groups(catalog, chosen)
                for start, batch in enumerate(batches(rows, size)):
                    excluded = batch.pop("excluded", None)
                    found = self._search(
                        self._params,
                        self.state.memory,
                        jax.device_put(batch, self._by_user),
                        self._trie if constrained else None,
                        jax.device_put(excluded, self._by_user),
                        beams=beams,
                    )
                    part = users[start * size : (start + 1) * size]
                    found = jax.device_get(found)
                    codes[part], scores[part] = (x[: len(part)] for x in found)
                    bar.update(len(part))
        return codes, scores

    def target_ranks(self, examples: Sequence[Example], progress: str = "") -> np.ndarray:
        """Teacher-forced ranks int32 [users, levels] of each target's codes.

        The rank of c_l given the history and the true c_1..c_{l-1}, from 1, among all tokens of the
        vocabulary; equal logits count against it.
        """
        catalog = self.data.catalog
        ranks = np.zeros((len(examples), catalog.space.levels), np.int32)
        with tqdm(total=len(examples), desc=progress, unit="user", disable=not progress) as bar:
            for length, users in self._by_length([example.history for example in examples]):
                rows = example_rows(catalog, [examples[user] for user in users], length)
                size = self._batch_size(len(examples))
                for start, batch in enumerate(batches(rows, size)):
                    found = self._rank(
                        self._params, self.state.memory, jax.device_put(batch, self._by_user)
                    )
                    part = users[start * size : (start + 1) * size]
                    ranks[part] = jax.device_get(found)[: len(part)]
                    bar.update(len(part))
        return ranks

    def _ranks(self, params: dict[str, Any], memory: jax.Array | None, rows: Rows) -> jax.Array:
        space = self.data.catalog.space

        def local(params, memory, rows):
            model = self.trainer.model(params)
            tokens, segment_ids = rows["tokens"], rows["segment_ids"]
            memory_rows = model.read_memory(memory, tokens, segment_ids)
            hidden, _ = model(tokens, segment_ids, rows["positions"], memory_rows)
            first = jnp.sum(segment_ids > 0, axis=1) - space.levels
            target = jnp.maximum(first[:, None] + jnp.arange(space.levels), 1)
            hidden = jnp.take_along_axis(hidden, target[..., None] - 1, axis=1)
            logits = model.llm.logits(hidden)
            codes = jnp.take_along_axis(tokens, target, axis=1)
            true = jnp.take_along_axis(logits, codes[..., None], axis=-1)
            return jnp.sum(logits >= true, axis=-1, dtype=jnp.int32)

        by_user = P(AXES)
        return jax.shard_map(
            local, mesh=self.mesh, in_specs=(P(), row_spec(), by_user), out_specs=by_user
        )(params, memory, rows)

    def _by_length(self, histories: Sequence[np.ndarray]) -> list[tuple[int, list[int]]]:
        """Users by how many items of history their batch has room for.

        Each room is compiled for itself, which many users are worth and few are not.
        """
        longest = self.config.data.max_items
        rooms = [longest] if len(histories) < MANY_USERS else [-(-longest // n) for n in (4, 2, 1)]
        found: dict[int, list[int]] = defaultdict(list)
        for user, history in enumerate(histories):
            found[next((room for room in rooms if len(history) <= room), longest)].append(user)
        return sorted(found.items())

    def _batch_size(self, users: int) -> int:
        size = min(self.config.evaluation.batch_size, users)
        return size + -size % self.mesh.size

    def describe_items(
        self, items: Sequence[int], new_tokens: int, end_tokens: Sequence[int] = ()
    ) -> np.ndarray:
        """What the model writes after each item's SID, greedily: int32 [items, new_tokens].

        -1 after one of `end_tokens`.
        """
        rows = prompt_rows(self.data.catalog, [np.array([item]) for item in items], 1)
        size = self._batch_size(len(items))
        write = jax.jit(partial(self._texts, new_tokens=new_tokens, end_tokens=tuple(end_tokens)))
        found = [
            jax.device_get(
                write(self._params, self.state.memory, jax.device_put(batch, self._by_user))
            )
            for batch in batches(rows, size)
        ]
        return np.concatenate(found)[: len(items)]

    def _texts(
        self,
        params: dict[str, Any],
        memory: jax.Array | None,
        prompts: Rows,
        *,
        new_tokens: int,
        end_tokens: tuple[int, ...],
    ) -> jax.Array:
        def local(params, memory, prompts):
            return generate(self.trainer.model(params), memory, prompts, new_tokens, end_tokens)

        by_user = P(AXES)
        return jax.shard_map(
            local,
            mesh=self.mesh,
            in_specs=(P(), row_spec(), by_user),
            out_specs=by_user,
        )(params, memory, prompts)

    def recommend(
        self, history: str | Sequence[int], top: int, exclude_seen: bool = False
    ) -> list[Recommendation]:
        """The best next items, best first; items that share a SID follow each other by id.

        Args:
          history: item ids, oldest first, as a sequence or as text `12,55,803`.
          top: how many items; fewer come back where the catalogue has fewer.
          exclude_seen: leave out the history's items.
        """
        catalog = self.data.catalog
        items = parse_history(history, len(catalog)) if isinstance(history, str) else history
        if top < 1:
            raise UserError(f"--top: expected 1 or more, got {top}")
        codes, scores = self.search(
            [np.asarray(items)], top, constrained=True, exclude_seen=exclude_seen
        )
        found = []
        for sid, score in zip(codes[0], scores[0], strict=True):
            if np.isfinite(score):
                for item in catalog.items_of_group(catalog.groups(sid[None])[0]):
                    if exclude_seen and item in items:
                        continue
                    found.append(
                        Recommendation(
                            int(item), catalog.titles[item], tuple(map(int, sid)), float(score)
                        )
                    )
        return found[:top]


def seen_groups(catalog: Any, histories: Sequence[np.ndarray]) -> np.ndarray:
    """Groups whose every item a history holds, int32 [users, most]; filled up with -1."""
    found = []
    for history in histories:
        groups, seen = np.unique(
            catalog.group_of_item[np.unique(np.asarray(history, np.int64))], return_counts=True
        )
        found.append(groups[seen == catalog.group_sizes[groups]])
    # A length of a few sizes only, since each is compiled.
    most = 1 << max(0, max((len(groups) for groups in found), default=1) - 1).bit_length()
    rows = np.full((len(found), most), -1, np.int32)
    for row, groups in zip(rows, found, strict=True):
        row[: len(groups)] = groups
    return rows


def parse_history(text: str, items: int) -> list[int]:
    """Item ids from `12,55,803`; UserError where one is no item."""
    history = []
    for part in text.split(","):
        if not part.strip().isdigit() or int(part) >= items:
            raise UserError(
                f"--history: {part.strip()!r} is not an item id; expected 0..{items - 1}"
            )
        history.append(int(part))
    return history
