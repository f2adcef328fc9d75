"""The catalogue's SIDs as a prefix trie in flat arrays, for constrained decoding.

Two numbers a node: a code and where its children start. Nodes of one level are numbered in the
lexicographic order of their prefixes, so that a node's children are neighbours, and the leaves
are the catalogue's groups in their order. A million SIDs of 5 levels take about 20 MB.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
import numpy as np

from prefixmem_jax.errors import UserError


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrieLevel:
    """Children of all nodes at one depth; the arrays can be arguments of a jitted function.

    Attributes:
      first_child: int32 [nodes + 1]; node i's children are first_child[i]..first_child[i+1]-1,
        which are also their node numbers at the next depth.
      code: [children], the code that leads to each child, ascending within a node; uint16 where the
        codebook fits, else int32.
      widest: the most children that a node has.
    """

    first_child: jax.Array | np.ndarray
    code: jax.Array | np.ndarray
    widest: int = field(metadata={"static": True})

    def children(self, nodes: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Children of nodes [...].

        Returns:
          codes, child node numbers and validity, [..., widest]; where not valid the other two
          mean nothing.
        """
        first = jnp.asarray(self.first_child)[nodes]
        stop = jnp.asarray(self.first_child)[nodes + 1]
        child = first[..., None] + jnp.arange(self.widest, dtype=jnp.int32)
        valid = child < stop[..., None]
        child = jnp.where(valid, child, 0)
        return jnp.asarray(self.code)[child].astype(jnp.int32), child, valid


def largest_levels(items: int, codebook_sizes: Sequence[int]) -> list[TrieLevel]:
    """`Trie.levels` of the most that a trie of so many items can have, of zeros."""
    levels, nodes = [], 1
    for size in codebook_sizes:
        children = min(items, nodes * size)
        code = np.zeros(children, _code_dtype(size))
        levels.append(TrieLevel(np.zeros(nodes + 1, np.int32), code, min(size, items)))
        nodes = children
    return levels


def _code_dtype(codebook_size: int) -> type:
    return np.uint16 if codebook_size <= 1 << 16 else np.int32


class Trie:
    """All distinct SIDs, and how many items share each.

    Attributes:
      sids: int32 [SIDs, levels], distinct, in lexicographic order.
      counts: int64 [SIDs], items by SID.
      levels: one `TrieLevel` for every level of the SIDs.
    """

    def __init__(self, sids: np.ndarray, codebook_sizes: Sequence[int]):
        """Builds the trie of these SIDs [items, levels], in any order; equal ones are one leaf."""
        sids = np.asarray(sids)
        self.codebook_sizes = tuple(codebook_sizes)
        if sids.ndim != 2 or sids.shape[1] != len(self.codebook_sizes) or not len(sids):
            raise UserError(
                f"a trie of {len(self.codebook_sizes)} levels needs SIDs [1 or more, "
                f"{len(self.codebook_sizes)}], got {list(sids.shape)}"
            )
        if sids.min() < 0 or (sids.max(axis=0) >= self.codebook_sizes).any():
            raise UserError(f"a SID has a code outside its codebook of {self.codebook_sizes}")
        order = _lexicographic(sids, self.codebook_sizes)
        ordered = sids[order]
        first = np.append(np.flatnonzero(_new(ordered)), len(ordered))
        self._set(ordered[first[:-1]].astype(np.int32), np.diff(first))

    def _set(self, sids: np.ndarray, counts: np.ndarray) -> None:
        self.sids, self.counts = sids, counts
        self.levels: list[TrieLevel] = []
        node_of_sid = np.zeros(len(sids), np.int64)
        new = np.zeros(len(sids), bool)
        new[0] = True
        for level, size in enumerate(self.codebook_sizes):
            new[1:] |= sids[1:, level] != sids[:-1, level]
            children = np.bincount(node_of_sid[new])
            first_child = np.concatenate([[0], np.cumsum(children)]).astype(np.int32)
            code = sids[new, level].astype(_code_dtype(size))
            self.levels.append(TrieLevel(first_child, code, int(children.max())))
            node_of_sid = np.cumsum(new) - 1

    def __len__(self) -> int:
        return len(self.sids)

    @property
    def nbytes(self) -> int:
        """Bytes of the arrays that decoding reads."""
        return sum(level.first_child.nbytes + level.code.nbytes for level in self.levels)

    @property
    def checksum(self) -> str:
        """SHA-256 of codebook sizes, SIDs and counts: equal for equal catalogues."""
        digest = hashlib.sha256(np.asarray(self.codebook_sizes, np.int64).tobytes())
        digest.update(np.ascontiguousarray(self.sids).tobytes())
        digest.update(self.counts.astype(np.int64).tobytes())
        return digest.hexdigest()

    def find(self, sids: np.ndarray) -> np.ndarray:
        """Leaves of SIDs [n, levels], int64 [n]; -1 where a SID is not in the trie."""
        node, depth = self._walk(sids)
        return np.where(depth == len(self.levels), node, -1)

    def depths(self, sids: np.ndarray) -> np.ndarray:
        """How many leading codes of SIDs [n, levels] some SID of the trie starts with, [n]."""
        return self._walk(sids)[1]

    def _walk(self, sids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        sids = np.asarray(sids)
        depth = np.zeros(len(sids), np.int64)
        node = np.zeros(len(sids), np.int64)
        known = np.ones(len(sids), bool)
        for level, wanted in zip(self.levels, sids.T, strict=True):
            low, high = level.first_child[node].astype(np.int64), level.first_child[node + 1]
            stop = high.astype(np.int64)
            while (low < high).any():  # the children's codes ascend
                middle = (low + high) // 2
                open_ = low < high
                less = open_ & (level.code[np.where(open_, middle, 0)] < wanted)
                low, high = np.where(less, middle + 1, low), np.where(open_ & ~less, middle, high)
            within = low < stop
            low = np.where(within, low, 0)
            known &= within & (level.code[low] == wanted)
            depth += known
            node = np.where(known, low, 0)
        return node, depth

    def added(self, sids: np.ndarray) -> Trie:
        """A trie with more items [n, levels]; those whose SID is there already join its group."""
        more = Trie(sids, self.codebook_sizes)
        leaf = self.find(more.sids)
        counts = self.counts.copy()
        counts[leaf[leaf >= 0]] += more.counts[leaf >= 0]
        both = np.concatenate([self.sids, more.sids[leaf < 0]])
        order = _lexicographic(both, self.codebook_sizes)
        return self._with(both[order], np.concatenate([counts, more.counts[leaf < 0]])[order])

    def removed(self, sids: np.ndarray) -> Trie:
        """A trie without one item for each of these SIDs [n, levels].

        Raises:
          UserError: more items are to go than a SID has, or none would be left.
        """
        less = Trie(sids, self.codebook_sizes)
        leaf = self.find(less.sids)
        counts = self.counts.copy()
        counts[leaf[leaf >= 0]] -= less.counts[leaf >= 0]
        if (leaf < 0).any() or counts.min() < 0:
            bad = (leaf < 0) | (counts[leaf] < 0)
            sid = "-".join(map(str, less.sids[np.argmax(bad)]))
            raise UserError(f"SID {sid} does not have as many items as are to be removed")
        if not counts.any():
            raise UserError("every item would be removed; a trie needs one")
        return self._with(self.sids[counts > 0], counts[counts > 0])

    def _with(self, sids: np.ndarray, counts: np.ndarray) -> Trie:
        trie = object.__new__(Trie)
        trie.codebook_sizes = self.codebook_sizes
        trie._set(sids, counts)
        return trie


def _new(ordered: np.ndarray) -> np.ndarray:
    """Whether each SID differs from the one before."""
    new = np.ones(len(ordered), bool)
    new[1:] = np.any(ordered[1:] != ordered[:-1], axis=1)
    return new


def _lexicographic(sids: np.ndarray, codebook_sizes: Sequence[int]) -> np.ndarray:
    """The stable order of SIDs: by as few sorts as their codes, packed into 63 bits, allow."""
    keys: list[np.ndarray] = []
    room = 1
    for size, column in zip(codebook_sizes, sids.T, strict=True):
        if not keys or room * size >= 1 << 63:
            keys.append(column.astype(np.int64))
            room = size
        else:
            keys[-1] = keys[-1] * size + column
            room *= size
    return np.lexsort(keys[::-1])
