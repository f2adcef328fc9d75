"""The engine: parameters and a catalogue, ready to search, to rank and to generate.

It knows nothing of runs, histories or optimizers: an exported catalogue and the model's parts are
enough. Evaluation, recommendation, and later roll-outs and serving, all use it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from prefixmem_jax.config_groups import EvaluationConfig
from prefixmem_jax.data.batch import Batch, batches
from prefixmem_jax.data.documents.items import (
    ask_for_last_item,
    document_length,
    prompt_documents,
)
from prefixmem_jax.data.packing import one_per_row
from prefixmem_jax.data.transitions import Transitions, needed
from prefixmem_jax.inference.cached_sid_lm import read_items
from prefixmem_jax.inference.item_prior import NEVER
from prefixmem_jax.inference.programs import (
    BY_USER,
    NEIGHBOURS,
    Program,
    SharedBySearches,
    room_for_seen,
    run_on_all_devices,
    search,
    target_ranks,
    write,
)
from prefixmem_jax.inference.transition_prior import TransitionTable
from prefixmem_jax.model_spec import ModelSpec
from prefixmem_jax.semantic_ids.catalog import Catalog

MANY_USERS = 2000
ITEMS_AT_ONCE = 1 << 16


def _nobody(users: int) -> None:
    """Is told how many users more are done."""


class Engine:
    """A model on a mesh: dense parameters on every device, the memory's rows spread over them.

    Users are divided among the devices, of one process or of several; each device searches for its
    own. With several processes all of them call alike, with all users, and all get all results.
    """

    def __init__(
        self,
        spec: ModelSpec,
        params: dict[str, Any],
        memory: jax.Array | None,
        catalog: Catalog,
        batch_size: int,
        transitions: Transitions | None = None,
    ):
        """Takes parameters that are whole on every device of the mesh (`ModelSpec.replicated`).

        Args:
          memory: rows as `ModelSpec.memory`.
          batch_size: users searched at a time, rounded up to a multiple of the devices.
          transitions: of the training, for searches with a `transition_share`.
        """
        self.spec = spec = spec.in_loops()
        self.use(params, memory)
        self.catalog = catalog
        self.max_items = spec.config.data.max_items
        self.item_tokens = spec.vocabulary.encode(catalog.sids)
        self._batch_size = batch_size
        self._trie = self._put(catalog.trie.levels, P())
        self._groups = self._transitions = None
        if spec.config.item_head is not None or transitions is not None:
            self._groups = self._put(catalog.group_of_item.astype(np.int32), P())
        if transitions is not None:
            # A rate of zero would leave out what was had, even where it may be had again.
            rates = np.float32(transitions.decay), np.float32(max(transitions.returns, NEVER))
            table = TransitionTable(*transitions.most_frequent(NEIGHBOURS), *rates)
            self._transitions = self._put(table, P())

    def use(self, params: dict[str, Any] | None, memory: jax.Array | None) -> None:
        """Other numbers for the same model, or none, to hold on to nothing."""
        self.params = params
        self.memory = memory
        self._items: jax.Array | None = None

    def search(
        self,
        histories: Sequence[np.ndarray],
        beams: int,
        constrained: bool,
        told: Callable[[int], object] = _nobody,
        exclude_seen: bool = False,
        options: EvaluationConfig | None = None,
    ) -> tuple[np.ndarray, np.ndarray]:
        """The best next SIDs after each history.

        Args:
          histories: item ids, oldest first; cut to the last `max_items`.
          constrained: only SIDs of the catalogue.
          told: is called with the number of users that are done, batch by batch.
          exclude_seen: leave out SIDs of which the history holds every item (constrained only).
            Else they come as often as training histories came back to an item, where these were
            counted (`options.transition_share`).
          options: how codes, items and transitions are put together (constrained only); None: the
            config's.

        Returns:
          codes int32 [users, beams, levels] and scores float32 [users, beams], best first; see
          `inference.beam_search.Beams`.
        """
        codes = np.full((len(histories), beams, self.catalog.space.levels), -1, np.int32)
        scores = np.full((len(histories), beams), -np.inf, np.float32)
        shared = SharedBySearches()
        if constrained:
            shared = self._catalogue(options or self.spec.config.evaluation)
        with_transitions = shared.transitions is not None
        if exclude_seen and constrained:
            shared = shared._replace(returns=self._put(np.float32(0.0), P()))
        elif with_transitions:
            shared = shared._replace(returns=shared.transitions.returns)
        for users, prompts in self._prompts(histories, told):
            own = [histories[user] for user in users]
            missing = (0, len(prompts.tokens) - len(own)), (0, 0)
            seen = recent = None
            if shared.returns is not None:
                seen = seen_groups(self.catalog, own, self.max_items)
                seen = np.pad(seen, missing, constant_values=-1)
            if with_transitions:
                recent = last_items(own, self.max_items)
                recent = np.pad(recent, missing, constant_values=-1)
            result = self._per_user(search, (shared,), (prompts, seen, recent), beams=beams)
            codes[users], scores[users] = (x[: len(users)] for x in result)
        return codes, scores

    def target_ranks(
        self,
        histories: Sequence[np.ndarray],
        targets: np.ndarray,
        told: Callable[[int], object] = _nobody,
    ) -> np.ndarray:
        """Teacher-forced ranks int32 [users, levels] of each target item's codes.

        The rank of c_l given the history and the true c_1..c_{l-1}, from 1, among all tokens of the
        vocabulary, or those that `objective.softmax` compares; equal logits count against it.
        `told`: as in `search`.
        """
        ranks = np.zeros((len(histories), self.catalog.space.levels), np.int32)
        for users, batch in self._prompts(histories, told, targets):
            ranks[users] = self._per_user(target_ranks, (), (batch,))[: len(users)]
        return ranks

    def describe_items(
        self, items: Sequence[int], new_tokens: int, end_tokens: Sequence[int] = ()
    ) -> np.ndarray:
        """What the model writes after each item's SID, greedily: int32 [items, new_tokens].

        -1 after one of `end_tokens`.
        """
        written = np.full((len(items), new_tokens), -1, np.int32)
        histories = [np.array([item]) for item in items]
        for users, prompts in self._prompts(histories, _nobody, rooms=[1]):
            result = self._per_user(
                write, (), (prompts,), new_tokens=new_tokens, end_tokens=tuple(end_tokens)
            )
            written[users] = result[: len(users)]
        return written

    def _catalogue(self, options: EvaluationConfig) -> SharedBySearches:
        """What a search over it goes by."""
        items = table = transitions = None
        if self.spec.config.item_head is not None:
            items = self._put(np.float32(options.item_share), P())
        if options.transition_share > 0:
            table = needed(self._transitions)
            transitions = self._put(np.float32(options.transition_share), P())
        return SharedBySearches(
            self._trie, self._groups, items, self._items_read(), table, transitions
        )

    def _items_read(self) -> jax.Array | None:
        """The item head's vectors [items, D] where it reads the memory, on every device."""
        head = self.spec.config.item_head
        if head is None or head.vectors == "own":
            return None
        if self._items is None:
            size = min(ITEMS_AT_ONCE, len(self.item_tokens))
            size += -size % self.spec.mesh.size
            found = [
                self._per_user(read_items, (), (tokens,))
                for tokens in batches(self.item_tokens, size)
            ]
            self._items = self._put(np.concatenate(found)[: len(self.item_tokens)], P())
        return self._items

    def _per_user(self, function: Callable, shared: tuple, users: tuple, **static: Any) -> Any:
        """Runs `function(model, rows_at, *shared, *users, **static)`, each device on its own users.

        Returns:
          Its result for all users, on the host of every process.
        """
        spec = self.spec
        program = Program(spec.graphdef, spec.table, spec.mesh, function, tuple(static.items()))
        placed = self._put(users, BY_USER)
        result = run_on_all_devices(program, self.params, self.memory, shared, placed)
        if jax.process_count() == 1:
            return jax.device_get(result)
        return jax.tree.map(lambda x: multihost_utils.process_allgather(x, tiled=True), result)

    def _put(self, tree: Any, partition: P) -> Any:
        """Host arrays, the same on every process, on the mesh."""
        sharding = NamedSharding(self.spec.mesh, partition)

        def put(x: Any) -> jax.Array:
            x = np.asarray(x)
            return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])

        return jax.tree.map(put, tree)

    def _prompts(
        self,
        histories: Sequence[np.ndarray],
        told: Callable[[int], object],
        targets: np.ndarray | None = None,
        rooms: list[int] | None = None,
    ) -> Iterator[tuple[list[int], Batch]]:
        """Batches of users with histories of similar length; each such length is compiled once.

        Args:
          targets: an item to append to each history.
          rooms: lengths, in items of history, to compile for.
        """
        size = min(self._batch_size, len(histories))
        size += -size % self.spec.mesh.size
        vocabulary, extra = self.spec.vocabulary, 0 if targets is None else 1
        for room, users in self._by_length(histories, rooms):
            cut = [histories[user][max(0, len(histories[user]) - room) :] for user in users]
            if targets is not None:
                cut = [np.append(h, targets[u]) for h, u in zip(cut, users, strict=True)]
            documents = prompt_documents(cut, self.item_tokens, vocabulary, room + extra)
            if targets is not None:
                ask_for_last_item(documents, vocabulary.levels)
            length = document_length(vocabulary.levels, room + extra)
            for start, batch in enumerate(batches(one_per_row(documents, length), size)):
                own = users[start * size : (start + 1) * size]
                yield own, batch
                told(len(own))

    def _by_length(
        self, histories: Sequence[np.ndarray], rooms: list[int] | None
    ) -> list[tuple[int, list[int]]]:
        """Users by how many items of history their batch has room for.

        Each room is compiled for itself, which many users are worth and few are not.
        """
        if rooms is None:
            longest = self.max_items
            many = len(histories) >= MANY_USERS
            rooms = [-(-longest // n) for n in (4, 2, 1)] if many else [longest]
        by_room: dict[int, list[int]] = defaultdict(list)
        for user, history in enumerate(histories):
            by_room[next((room for room in rooms if len(history) <= room), rooms[-1])].append(user)
        return sorted(by_room.items())


def last_items(histories: Sequence[np.ndarray], most: int) -> np.ndarray:
    """Their last items, the newest at the end: int32 [users, most]; -1 before the first."""
    found = np.full((len(histories), most), -1, np.int32)
    for row, history in zip(found, histories, strict=True):
        if len(history):
            row[-len(history) :] = history[-most:]
    return found


def seen_groups(catalog: Catalog, histories: Sequence[np.ndarray], room: int) -> np.ndarray:
    """Groups whose every item a history holds, int32 [users, at least room]; filled up with -1."""
    by_user = []
    for history in histories:
        groups, seen = np.unique(
            catalog.group_of_item[np.unique(np.asarray(history, np.int64))], return_counts=True
        )
        by_user.append(groups[seen == catalog.group_sizes[groups]])
    most = max([room, *map(len, by_user)])
    most = room_for_seen(most)
    padded = np.full((len(by_user), most), -1, np.int32)
    for row, groups in zip(padded, by_user, strict=True):
        row[: len(groups)] = groups
    return padded
