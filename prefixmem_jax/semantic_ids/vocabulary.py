"""Which token stands for what: text, padding, BOS, and the codes of every level.

`Vocabulary` is the only place that does arithmetic on token ids.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

import jax
import jax.numpy as jnp
import numpy as np

from prefixmem_jax.semantic_ids.space import SidSpace


@dataclass(frozen=True)
class Vocabulary:
    """Text tokens, padding, BOS, the SID tokens level by level, and tokens that fill it up.

    The token of (level, code) is `sid_offset + sum(sizes of earlier levels) + code`.

    Attributes:
      space: of the SIDs.
      text_tokens: size of the text vocabulary, which comes first.
      multiple: the size is filled up to a multiple of this with tokens that never occur.
      items: of the catalogue, where the model scores them whole; 0 where that is not known.
      sids: of the items, int32 [items, levels], for training to score them by; or None.
      item_counts: occurrences of every item in training, int64 [items], for negatives to be drawn
        by; or None.
    """

    space: SidSpace
    text_tokens: int = 0
    multiple: int = 1
    items: int = 0
    sids: np.ndarray | None = field(default=None, compare=False, repr=False)
    item_counts: np.ndarray | None = field(default=None, compare=False, repr=False)

    @property
    def levels(self) -> int:
        return self.space.levels

    @property
    def pad_token(self) -> int:
        return self.text_tokens

    @property
    def bos_token(self) -> int:
        """The token that every document starts with."""
        return self.text_tokens + 1

    @property
    def sid_offset(self) -> int:
        """The token of level 1, code 0."""
        return self.text_tokens + 2

    @property
    def used(self) -> int:
        """Tokens without those that fill the vocabulary up."""
        return self.sid_offset + sum(self.space.codebook_sizes)

    @property
    def size(self) -> int:
        """Every token."""
        return -(-self.used // self.multiple) * self.multiple

    @property
    def item_outputs(self) -> int:
        """Items, filled up as the vocabulary is."""
        return -(-self.items // self.multiple) * self.multiple

    def token_range(self, level: int) -> tuple[int, int]:
        """First and one-past-last token of a level."""
        start = self.sid_offset + sum(self.space.codebook_sizes[: level - 1])
        return start, start + self.space.codebook_sizes[level - 1]

    def _starts(self) -> np.ndarray:
        """First token of every level, and one past the last: int32 [levels + 1]."""
        return self.sid_offset + np.cumsum([0, *self.space.codebook_sizes], dtype=np.int32)

    def encode(self, codes: np.ndarray) -> np.ndarray:
        """Codes [..., levels] to tokens [..., levels], int32, on the host."""
        return (np.asarray(codes) + self._starts()[:-1]).astype(np.int32)

    @cached_property
    def item_tokens(self) -> np.ndarray:
        """SID tokens of every item, int32 [items, levels], where `sids` are known."""
        return self.encode(self.sids)

    def decode(self, tokens: np.ndarray) -> np.ndarray:
        """Tokens [..., levels] of whole SIDs to codes [..., levels], int32, on the host."""
        return (np.asarray(tokens) - self._starts()[:-1]).astype(np.int32)

    def encode_prefix(self, codes: jax.Array) -> jax.Array:
        """Codes c_1..c_l [..., l] to their tokens [..., l], on the device."""
        return codes + jnp.asarray(self._starts()[: codes.shape[-1]], codes.dtype)

    def is_text(self, tokens: np.ndarray) -> np.ndarray:
        """Whether each token is of the text vocabulary."""
        return (tokens >= 0) & (tokens < self.text_tokens)

    def level_and_code(self, tokens: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Level (0 where the token is no SID token) and code (0 there) of tokens, any shape."""
        starts = self._starts()
        level = sum((tokens >= start).astype(jnp.int32) for start in starts[:-1])
        level = jnp.where(tokens < starts[-1], level, 0)
        code = jnp.zeros_like(tokens)
        for number, start in enumerate(starts[:-1], start=1):
            code = jnp.where(level == number, tokens - start, code)
        return level, code

    def prefixes(
        self, tokens_BS: jax.Array, segment_ids_BS: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """The prefix c_1..c_l of the item that each position is in.

        A prefix counts only when the tokens really are c_1..c_l of one item: contiguous, in
        level order, within one packed document (segment ids 1, 2, ...; 0 is padding).

        Returns:
          level_BS: l, or 0 where there is no such prefix.
          codes_BSL: c_1..c_l in the first l places, zeros after.
        """
        level_BS, code_BS = self.level_and_code(tokens_BS)
        whole = (level_BS > 0) & (segment_ids_BS > 0)
        back = [code_BS]  # back[i] holds the code i positions earlier
        for i in range(1, self.levels):
            follows = (earlier(level_BS, i) == level_BS - i) & (
                earlier(segment_ids_BS, i) == segment_ids_BS
            )
            whole &= follows | (i >= level_BS)
            back.append(earlier(code_BS, i))
        level_BS = jnp.where(whole, level_BS, 0)
        columns = []
        for j in range(1, self.levels + 1):  # c_j lies (l - j) positions back
            column = jnp.zeros_like(code_BS)
            for level in range(j, self.levels + 1):
                column = jnp.where(level_BS == level, back[level - j], column)
            columns.append(column)
        return level_BS, jnp.stack(columns, axis=-1)

    def last_items(
        self,
        level_BS: jax.Array,
        codes_BSL: jax.Array,
        segment_ids_BS: jax.Array,
        count: int,
    ) -> tuple[jax.Array, jax.Array]:
        """The last whole items up to each position that has a prefix (of `prefixes`).

        An item counts where the tokens from its first code to this position are codes of whole
        items, one after the other, and the prefix, all within one document.

        Returns:
          exists_BSK: whether there are that many, for 1..count items.
          codes_BSKL: of the k-th last item.
        """
        written_BS = level_BS % self.levels  # codes since the last whole item
        exists_BS, columns = level_BS > 0, []
        for number in range(count):
            exists_here, codes_here = jnp.zeros_like(exists_BS), jnp.zeros_like(codes_BSL)
            for written in range(self.levels):
                back = written + number * self.levels
                here = (written_BS == written) & (earlier(level_BS, back) == self.levels)
                here &= earlier(segment_ids_BS, back) == segment_ids_BS
                exists_here |= here
                codes_here = jnp.where(here[..., None], earlier(codes_BSL, back), codes_here)
            exists_BS = exists_BS & exists_here
            columns.append((exists_BS, codes_here))
        exists, codes = zip(*columns, strict=True)
        return jnp.stack(exists, axis=-1), jnp.stack(codes, axis=2)


def earlier(x_BS: jax.Array, distance: int) -> jax.Array:
    """What stood so many positions earlier, [B, S, ...]; zero before the first."""
    padding = [(0, 0)] * x_BS.ndim
    padding[1] = (distance, 0)
    return jnp.pad(x_BS, padding)[:, : x_BS.shape[1]]
