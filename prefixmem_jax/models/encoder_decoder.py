"""An encoder-decoder in T5's shape, as TIGER generates Semantic IDs (Rajput et al. 2023).

The encoder reads a history both ways; the decoder writes the SID of the item to come and attends to
what was encoded. It stands where a `Decoder` stands in a `SidLM`, so that loss, search and memory
are the same. Dimension letters: see `models.decoder`; further P documents of a row whose next item
is asked for, C codes of an item, T = P * C, U buckets of distances.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from prefixmem_jax.config_groups import DecoderConfig
from prefixmem_jax.layers.attention import KeyValues, Place, appended
from prefixmem_jax.layers.cross_layer import CrossLayer
from prefixmem_jax.layers.dropout import dropout
from prefixmem_jax.layers.relative_attention import (
    BUCKETS,
    bias_between,
    own_attention,
    relative_attention,
)
from prefixmem_jax.layers.stack import run_layers
from prefixmem_jax.layers.transformer import WHOLE, Layer, RMSNorm
from prefixmem_jax.models.token_tables import TokenTables
from prefixmem_jax.parallel.parameters import normal
from prefixmem_jax.parallel.sharding import (
    constrain,
    first_positions,
    put_positions,
    take_positions,
)


class Encoded(NamedTuple):
    """What the decoder's layers have of whole rows.

    Attributes:
      encoder: keys and values of the encoder's tokens, [L, B, S, K, H].
      start: of what each row's first answer starts from, [L, B, 1, K, H].
    """

    encoder: KeyValues
    start: KeyValues


class EncoderDecoder(TokenTables):
    """Embeddings, the stacked layers of both halves, their final norms and the head.

    A document is a history and the item to be guessed. What is asked for, position by position,
    parts the two: the position before the item's first code is where the decoder starts from, with
    a vector of its own; the codes after it are read by the decoder, and unknown to the encoder.
    """

    def __init__(
        self,
        config: DecoderConfig,
        encoder_layers: int,
        vocabulary_size: int,
        codes: int,
        answers: int,
        *,
        rngs: nnx.Rngs,
    ):
        """
        Args:
          config: of both halves; `layers` is the decoder's number.
          codes: of an item, the most that is asked for in a document.
          answers: documents with something asked for that a row has at most.
        """
        self.config, self.codes, self.answers = config, codes, answers
        self.make_embedding(vocabulary_size, rngs)
        self.start = normal(rngs, config.init_std, (config.d_model, None))
        heads, buckets = (config.query_heads, "heads"), (BUCKETS, None)
        self.encoder_bias = normal(rngs, config.init_std, buckets, heads)
        self.decoder_bias = normal(rngs, config.init_std, buckets, heads)
        self.encoder_layers = nnx.vmap(lambda r: Layer(config, rngs=r))(
            rngs.fork(split=encoder_layers)
        )
        self.encoder_norm = RMSNorm(config.d_model, config)
        self.layers = nnx.vmap(lambda r: CrossLayer(config, rngs=r))(rngs.fork(split=config.layers))
        self.final_norm = RMSNorm(config.d_model, config)
        self.make_head(vocabulary_size, rngs)
        self.depth = encoder_layers

    def __call__(
        self,
        x_BSD: jax.Array,
        place: Place,
        key: jax.Array | None = None,
        *,
        asked_BS: jax.Array,
    ) -> tuple[jax.Array, Encoded]:
        """Runs whole rows, embedded.

        Args:
          key: for dropout; None for none.
          asked_BS: above 0 where the next token is asked for.

        Returns:
          Hidden states after the final norm [B, S, D], meaningless where nothing is asked for; and
          what the decoder's layers have of the rows.
        """
        keys = (None,) * 3 if key is None else jax.random.split(key, 3)
        x_BSD = dropout(x_BSD, self.config.dropout, keys[0], *WHOLE)
        asked = asked_BS > 0
        is_answer = jnp.pad(asked[:, :-1], ((0, 0), (1, 0)))
        rows, length = x_BSD.shape[:2]
        answers = min(self.answers, length)
        from_BP, found_BP = first_positions(asked & ~is_answer, answers)
        known = place._replace(segments=jnp.where(is_answer, 0, place.segments))
        encoder = self._encode(x_BSD, known, keys[1])

        at_BPC = from_BP[..., None] + jnp.arange(self.codes)
        at_BT = jnp.minimum(at_BPC, length - 1).reshape(rows, -1)
        is_start_T1 = (np.arange(at_BT.shape[1]) % self.codes == 0)[:, None]
        x_BTD = take_positions(x_BSD, at_BT)
        x_BTD = jnp.where(is_start_T1, self.start[...].astype(x_BSD.dtype), x_BTD)

        def each_code(values_BP: jax.Array) -> jax.Array:
            return jnp.repeat(values_BP, self.codes, axis=1)

        # Of its encoder's tokens an answer sees those up to where it starts from.
        start_place = jax.tree.map(lambda x: take_positions(x, from_BP), place)
        across = Place(
            each_code(start_place.positions),
            each_code(jnp.where(found_BP, start_place.segments, -1)),
        )
        code_T, answer_T = np.tile(np.arange(self.codes), answers), np.arange(answers)
        by_row = (
            constrain(jnp.broadcast_to(x, at_BT.shape), "batch", None)
            for x in (code_T, answer_T.repeat(self.codes))
        )
        among = Place(*by_row)
        y_BTD, own = self._decode(x_BTD, among, across, encoder, known, keys[2])
        put_at = jnp.where(found_BP[..., None], at_BPC, length).reshape(rows, -1)
        hidden_BSD = put_positions(y_BTD, put_at, length)
        return hidden_BSD, Encoded(encoder, jax.tree.map(lambda kept: kept[:, :, :1], own))

    def for_beams(self, cache: Encoded) -> tuple[KeyValues, KeyValues]:
        """What all beams share of `__call__`'s cache, and what each has of its own already."""
        return cache.encoder, jax.tree.map(lambda kept: kept[:, :, None], cache.start)

    def extend_beams(
        self,
        x_BSD: jax.Array,
        queries: Place,
        prompt: KeyValues,
        prompt_keys: Place,
        own: KeyValues,
    ) -> tuple[jax.Array, KeyValues]:
        """Runs the next token of every beam; as `Decoder.extend_beams`."""
        count = own.keys.shape[3] + 1
        bias_NA = bias_between(self._bias(self.decoder_bias), count, count, both_ways=False)[:, -1]

        def attend(before: KeyValues, query: jax.Array, new: KeyValues) -> tuple:
            after = appended(before, new)
            return own_attention(query, after, bias_NA, self.config.query_scale), after

        def body(x: jax.Array, one: tuple) -> tuple:
            layer, encoded, before = one
            return layer(x, queries, partial(attend, before), encoded, prompt_keys)

        x_BSD, after = run_layers(body, x_BSD, (self.layers, prompt, own), self.config)
        return self.final_norm(x_BSD), after

    def _encode(self, x_BSD: jax.Array, place: Place, key: jax.Array | None) -> KeyValues:
        """The encoder; keys and values of its output for each of the decoder's layers."""
        length = x_BSD.shape[1]
        bias_NSS = bias_between(self._bias(self.encoder_bias), length, length, both_ways=True)

        def attend(query: jax.Array, new: KeyValues) -> tuple:
            scale = self.config.query_scale
            return relative_attention(query, place, new, bias_NSS, False, scale), None

        def body(x: jax.Array, one: tuple) -> tuple:
            layer, key = one
            return layer(x, None, attend, key)

        keys = None if key is None else jax.random.split(key, self.depth)
        x_BSD, _ = run_layers(body, x_BSD, (self.encoder_layers, keys), self.config)
        encoded_BSD = constrain(self.encoder_norm(x_BSD), *WHOLE)

        def for_layer(_: None, layer: CrossLayer) -> tuple:
            return None, layer.encoded(encoded_BSD)

        return jax.lax.scan(for_layer, None, self.layers)[1]

    def _decode(
        self,
        x_BTD: jax.Array,
        among: Place,
        across: Place,
        encoder: KeyValues,
        keys: Place,
        key: jax.Array | None,
    ) -> tuple[jax.Array, KeyValues]:
        """The decoder over whole answers: hidden states, and their own keys and values.

        Args:
          among: the tokens as they see each other; across: as they see the encoder's.
        """
        count = x_BTD.shape[1]
        bias_NTT = bias_between(self._bias(self.decoder_bias), count, count, both_ways=False)

        def attend(query: jax.Array, new: KeyValues) -> tuple:
            scale = self.config.query_scale
            return relative_attention(query, among, new, bias_NTT, True, scale), new

        def body(x: jax.Array, one: tuple) -> tuple:
            layer, encoded, key = one
            return layer(x, across, attend, encoded, keys, key)

        dropping = None if key is None else jax.random.split(key, self.config.layers)
        x_BTD, own = run_layers(body, x_BTD, (self.layers, encoder, dropping), self.config)
        return self.final_norm(x_BTD), own

    def _bias(self, bias: nnx.Param) -> jax.Array:
        return bias[...].astype(self.config.compute_dtype)
