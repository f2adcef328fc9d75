"""The space of Semantic IDs: levels, codes, and the tokens that stand for them.

`SidSpace` is the only place that knows where SID tokens lie in the vocabulary. Nobody else
does arithmetic on token ids.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

SPECIAL_TOKENS = 2  # padding and BOS, just before the SID tokens


@dataclass(frozen=True)
class SidSpace:
    """Codebook sizes by level, and the vocabulary entry of the first SID token.

    Level numbers are 1-based as in the paper; level 0 means "not a SID token". Codes are
    0-based. The token of (level, code) is `token_offset + sum(sizes of earlier levels) + code`.
    After the SID tokens the vocabulary is filled up to a multiple of `vocabulary_multiple`.
    """

    codebook_sizes: tuple[int, ...]
    token_offset: int = SPECIAL_TOKENS
    vocabulary_multiple: int = 1

    @property
    def text_tokens(self) -> int:
        """Size of the text vocabulary that stands before padding and BOS."""
        return self.token_offset - SPECIAL_TOKENS

    @property
    def bos_token(self) -> int:
        """The token that every document starts with."""
        return self.token_offset - 1

    @property
    def levels(self) -> int:
        return len(self.codebook_sizes)

    @property
    def vocabulary_size(self) -> int:
        """Every token, with those that fill the vocabulary up."""
        used = self.token_offset + sum(self.codebook_sizes)
        return -(-used // self.vocabulary_multiple) * self.vocabulary_multiple

    def token_range(self, level: int) -> tuple[int, int]:
        """First and one-past-last token of a 1-based level."""
        start = self.token_offset + sum(self.codebook_sizes[: level - 1])
        return start, start + self.codebook_sizes[level - 1]

    def _starts(self) -> np.ndarray:
        """First token of every level, and one past the last: int32 [levels + 1]."""
        return self.token_offset + np.cumsum([0, *self.codebook_sizes], dtype=np.int32)

    def encode(self, codes: np.ndarray) -> np.ndarray:
        """Codes [..., levels] to tokens [..., levels], int32, on the host."""
        return (np.asarray(codes) + self._starts()[:-1]).astype(np.int32)

    def decode(self, tokens: np.ndarray) -> np.ndarray:
        """Tokens [..., levels] of whole SIDs to codes [..., levels], int32, on the host."""
        return (np.asarray(tokens) - self._starts()[:-1]).astype(np.int32)

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

            def earlier(x: jax.Array, distance: int = i) -> jax.Array:
                padded = jnp.pad(x, ((0, 0), (distance, 0)))
                return padded[:, : x.shape[1]]

            follows = (earlier(level_BS) == level_BS - i) & (
                earlier(segment_ids_BS) == segment_ids_BS
            )
            whole &= follows | (i >= level_BS)
            back.append(earlier(code_BS))
        level_BS = jnp.where(whole, level_BS, 0)
        columns = []
        for j in range(1, self.levels + 1):  # c_j lies (l - j) positions back
            column = jnp.zeros_like(code_BS)
            for level in range(j, self.levels + 1):
                column = jnp.where(level_BS == level, back[level - j], column)
            columns.append(column)
        return level_BS, jnp.stack(columns, axis=-1)
