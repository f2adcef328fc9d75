"""One decoder-only transformer: Qwen3, Llama 3 and Gemma 3 at any size, by configuration.

Pre-norm RMSNorm, rotary embeddings (rotate-half), grouped-query attention with optional q/k
norm and sliding windows, gated feed-forward, optional tying of the output head. Layers are stacked
along a leading axis and run by `run_layers`. Dimension letters: B batch, S query positions, T key
positions, D model, N query heads, K key/value heads, G query heads per key/value head, H head size,
F feed-forward, L layers, V vocabulary, A a beam's own tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from prefixmem_jax.config_groups import DecoderConfig
from prefixmem_jax.layers.attention import (
    NO_WINDOW,
    KeyValues,
    Place,
    appended,
    attention,
    beam_attention,
    self_attention,
)
from prefixmem_jax.layers.dropout import dropout
from prefixmem_jax.layers.stack import run_layers
from prefixmem_jax.layers.transformer import WHOLE, Layer, RMSNorm, rope_frequencies, rotation
from prefixmem_jax.models.token_tables import TokenTables


class Decoder(TokenTables):
    """Token embeddings, the stacked layers, the final norm and the head."""

    def __init__(
        self,
        config: DecoderConfig,
        vocabulary_size: int,
        longest_document: int = NO_WINDOW,
        *,
        rngs: nnx.Rngs,
    ):
        """
        Args:
          longest_document: tokens that a document of a whole sequence has at most, so that no
            attention looks further back.
        """
        self.config = config
        self.longest_document = longest_document
        self.make_embedding(vocabulary_size, rngs)
        self.layers = nnx.vmap(lambda r: Layer(config, rngs=r))(rngs.fork(split=config.layers))
        self.final_norm = RMSNorm(config.d_model, config)
        self.make_head(vocabulary_size, rngs)

    def __call__(
        self,
        x_BSD: jax.Array,
        queries: Place,
        key: jax.Array | None = None,
        *,
        asked_BS: jax.Array | None = None,
    ) -> tuple[jax.Array, KeyValues]:
        """Runs whole sequences, embedded.

        Args:
          key: for dropout; None for none.
          asked_BS: where the next token is asked for, which an encoder-decoder wants to know.

        Returns:
          Hidden states after the final norm [B, S, D], and keys and values [L, B, S, K, H].
        """
        del asked_BS
        scale, longest = self.config.query_scale, self.longest_document
        windows = sorted({min(int(window), longest) for window in self._windows()})

        def attend(_: None, window: jax.Array, query: jax.Array, new: KeyValues) -> tuple:
            window = jnp.minimum(window, longest)
            if self.config.attention == "plain":
                return attention(query, queries, new, queries, window, scale), new
            return self_attention(query, queries, new, window, windows, scale, longest), new

        keys = None
        if key is not None:
            first, rest = jax.random.split(key)
            x_BSD = dropout(x_BSD, self.config.dropout, first, *WHOLE)
            keys = jax.random.split(rest, self.config.layers)
        return self._run(x_BSD, queries, attend, None, keys)

    def extend(
        self,
        x_BSD: jax.Array,
        queries: Place,
        cache: KeyValues,
        keys: Place,
        write_at: jax.Array | int,
    ) -> tuple[jax.Array, KeyValues]:
        """Runs the next S tokens of sequences whose keys and values are cached.

        Args:
          cache: [L, B, T, K, H]; these S positions are written at `write_at`.
          keys: where the T cached tokens stand, those written now included. A place that is not
            filled yet must not be visible: another segment, or a later position.

        Returns:
          Hidden states [B, S, D], and the cache.
        """
        scale = self.config.query_scale

        def attend(past: KeyValues, window: jax.Array, query: jax.Array, new: KeyValues) -> tuple:
            past = jax.tree.map(
                lambda old, add: jax.lax.dynamic_update_slice_in_dim(old, add, write_at, axis=1),
                past,
                new,
            )
            return attention(query, queries, past, keys, window, scale), past

        return self._run(x_BSD, queries, attend, cache)

    def for_beams(self, cache: KeyValues) -> tuple[KeyValues, KeyValues]:
        """What all beams share of `__call__`'s cache, [L, B, T, K, H], and what each has of its own
        already: nothing, [L, B, 1, 0, K, H].
        """
        return cache, jax.tree.map(lambda kept: kept[:, :, :1, None][:, :, :, :0], cache)

    def extend_beams(
        self,
        x_BSD: jax.Array,
        queries: Place,
        prompt: KeyValues,
        prompt_keys: Place,
        own: KeyValues,
    ) -> tuple[jax.Array, KeyValues]:
        """Runs the next token of every beam: S beams of one user share the user's prompt.

        Args:
          prompt: [L, B, T, K, H], only read.
          own: each beam's tokens after the prompt, [L, B, S, A, K, H].

        Returns:
          Hidden states [B, S, D], and `own` with the new token: [L, B, S, A + 1, K, H].
        """
        scale = self.config.query_scale

        def attend(past: tuple, window: jax.Array, query: jax.Array, new: KeyValues) -> tuple:
            shared, before = past
            after = appended(before, new)
            attended = beam_attention(query, queries, shared, prompt_keys, after, window, scale)
            return attended, after

        return self._run(x_BSD, queries, attend, (prompt, own))

    def _run(
        self,
        x_BSD: jax.Array,
        queries: Place,
        attend: Callable[..., tuple],
        past: Any,
        keys: jax.Array | None = None,
    ) -> tuple[jax.Array, KeyValues]:
        """All layers; `attend(past of the layer, window, query, new keys and values)`."""
        window_L, frequency_LH = self._by_layer()
        # Most layers have the same: what turns them is made once.
        frequency_KH, kind_L = np.unique(frequency_LH, axis=0, return_inverse=True)
        rotation_KBSH = rotation(queries.positions, jnp.asarray(frequency_KH[:, None, None]))

        def body(x: jax.Array, one: tuple) -> tuple:
            layer, past, window, kind, key = one
            rotation_BSH = jax.tree.map(lambda of_kinds: of_kinds[kind], rotation_KBSH)
            return layer(x, rotation_BSH, partial(attend, past, window), key)

        layers = (self.layers, past, jnp.asarray(window_L), jnp.asarray(kind_L), keys)
        x_BSD, kept = run_layers(body, x_BSD, layers, self.config)
        return self.final_norm(x_BSD), kept

    def _by_layer(self) -> tuple[np.ndarray, np.ndarray]:
        """Each layer's window int32 [L] and rotary frequencies float32 [L, H / 2]."""
        config, window_L = self.config, self._windows()
        everywhere = rope_frequencies(config.head_dim, config.rope_base, config.rope_scaling)
        near = rope_frequencies(config.head_dim, config.sliding_rope_base)
        slides_L1 = (window_L != NO_WINDOW)[:, None]
        return window_L, np.where(slides_L1, near, everywhere)

    def _windows(self) -> np.ndarray:
        """Each layer's window, int32 [L]."""
        config = self.config
        slides_L = np.isin(np.arange(config.layers), config.sliding_layers)
        return np.where(slides_L, config.sliding_window, NO_WINDOW).astype(np.int32)
