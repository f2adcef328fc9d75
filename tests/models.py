"""Fixture models: small, random, and strong enough that whatever is left out is seen."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from prefixmem_jax.config import Config
from prefixmem_jax.config_groups import (
    DataConfig,
    DecoderConfig,
    ItemHeadConfig,
    OptimizerConfig,
    SyntheticConfig,
)
from prefixmem_jax.data.batch import Batch
from prefixmem_jax.data.documents.items import document_length, prompt_documents
from prefixmem_jax.data.packing import one_per_row
from prefixmem_jax.data.prepare import prepare_data
from prefixmem_jax.inference.cached_sid_lm import RowsAt, rows_for
from prefixmem_jax.model_spec import ModelSpec
from prefixmem_jax.models.decoder import Decoder
from prefixmem_jax.models.encoder_decoder import EncoderDecoder
from prefixmem_jax.models.sid_lm import SidLM
from prefixmem_jax.parallel.mesh import make_mesh
from prefixmem_jax.runs.checkpoint import Checkpoints
from prefixmem_jax.runs.run import DataDescription, Run
from prefixmem_jax.semantic_ids.catalog import Catalog
from prefixmem_jax.semantic_ids.space import SidSpace
from prefixmem_jax.semantic_ids.vocabulary import Vocabulary
from prefixmem_jax.sid_encoders.prefix_memory import PrefixMemoryConfig
from prefixmem_jax.training.initialise import initial_state
from prefixmem_jax.training.parts import to_parts

DECODER = DecoderConfig(
    layers=2, d_model=24, d_ff=32, query_heads=4, kv_heads=2, head_dim=8, init_std=0.3
)
FAMILIES = {
    "qwen3": DECODER,
    "llama": dataclasses.replace(DECODER, qk_norm=False, kv_heads=1),
    # A window shorter than a SID: a beam's own tokens leave it too.
    "gemma3": dataclasses.replace(
        DECODER,
        activation="gelu_tanh",
        norm_plus_one=True,
        post_norms=True,
        query_scale=0.25,
        scale_embedding=True,
        logit_softcap=5.0,
        tied_embeddings=True,
        sliding_layers=(0,),
        sliding_window=2,
    ),
}


def make_decoder(config: DecoderConfig, vocabulary: Vocabulary, rngs: nnx.Rngs) -> Decoder:
    return Decoder(config, vocabulary.size, rngs=rngs)


def make_encoder_decoder(
    config: DecoderConfig, vocabulary: Vocabulary, rngs: nnx.Rngs
) -> EncoderDecoder:
    """With more encoder layers than decoder layers, and room for more answers than are asked for."""
    return EncoderDecoder(config, 3, vocabulary.size, vocabulary.levels, 2, rngs=rngs)


def make_model(
    sizes: tuple[int, ...],
    items: int,
    with_sid_encoder: bool,
    seed: int,
    decoder: DecoderConfig = DECODER,
    item_head: ItemHeadConfig | None = None,
    make_llm: Callable = make_decoder,
) -> tuple[SidLM, RowsAt | None, Catalog, np.random.Generator]:
    """A model without a run, the rows of its memory, a random catalogue, and what drew it."""
    space = SidSpace(sizes)
    rng = np.random.default_rng(seed)
    sids = np.stack([rng.integers(0, size, items) for size in sizes], axis=1)
    catalog = Catalog(sids, [None] * items, space)
    sid_encoder = rows_at = None
    if with_sid_encoder:
        # The paper's, or with the memory across items in one way or the other.
        first, levels = 2 - seed % 2, space.levels
        sid_encoder = PrefixMemoryConfig(
            target_levels=tuple(range(first, levels + 1)),
            orders=levels - 1,
            items=seed % 3,
            heads=2,
            rows=64,
            d_mem=8,
        )
    vocabulary = Vocabulary(space, items=items)
    rngs = nnx.Rngs(seed)
    llm = make_llm(decoder, vocabulary, rngs)
    model = SidLM(llm, sid_encoder, vocabulary, item_head, rngs=rngs)
    if with_sid_encoder:  # strong enough to change every ranking
        table = sid_encoder.table(space)
        rows_at = partial(table.gather, 20 * table.init(jax.random.key(seed)))
        projection = model.sid_encoder.projection
        projection[...] = 100 * projection[...]
    return model, rows_at, catalog, rng


def prompts(model: SidLM, catalog: Catalog, histories: list, max_items: int) -> Batch:
    """Histories to go on from, one a row."""
    item_tokens = model.vocabulary.encode(catalog.sids)
    documents = prompt_documents(histories, item_tokens, model.vocabulary, max_items)
    length = document_length(catalog.space.levels, max_items)
    return jax.tree.map(jnp.asarray, one_per_row(documents, length))


def whole_logits(model: SidLM, rows_at: RowsAt | None, sequences: Sequence) -> np.ndarray:
    """Logits [B, S, V] of token sequences, one a row, padded on the right: no cache."""
    lengths = np.array([len(tokens) for tokens in sequences])
    batch = Batch.zeros(len(lengths), lengths.max())
    filled = np.arange(lengths.max()) < lengths[:, None]
    batch.tokens[filled] = np.concatenate(sequences)
    for back in range(model.vocabulary.levels):  # the last item's codes are asked for
        batch.loss_mask[np.arange(len(lengths)), lengths - 2 - back] = 1
    batch = batch._replace(
        segment_ids=filled.astype(np.int32), positions=np.cumsum(filled, axis=1) - filled
    )

    @jax.jit
    def logits(batch: Batch) -> jax.Array:
        rows = rows_for(model, rows_at, batch.tokens, batch.segment_ids)
        return model.softmax_head().logits(model(batch, rows)[0])

    return np.asarray(logits(batch))


SID_ENCODER = PrefixMemoryConfig(target_levels=(2, 3, 4), orders=3, heads=2, rows=300, d_mem=16)


def small_config(model: DecoderConfig, text_tokens: int, **changes) -> Config:
    """A config of 150 synthetic items with 4 levels of codes, and 60 users."""
    config = Config(
        "small",
        data=DataConfig(
            text_tokens=text_tokens,
            vocabulary_multiple=8,
            sequence_length=64,
            batch_size=4,
            max_items=8,
            synthetic=SyntheticConfig(
                items=150, users=60, codebook_sizes=(6, 8, 7, 9), children=(6, 4, 4, 3)
            ),
        ),
        model=model,
        sid_encoder=SID_ENCODER,
        optimizer=OptimizerConfig(learning_rate=3e-3),
    )
    return dataclasses.replace(config, **changes)


def make_run(folder: Path, config: Config) -> Run:
    """A run with a checkpoint of its first state, its SID encoder made to matter as if trained."""
    data = prepare_data(config.data)
    spec = ModelSpec.create(config, data.vocabulary, make_mesh(devices=jax.devices()[:1]))
    state = initial_state(spec, config.init, seed=1)
    params = dict(state.params)
    if config.sid_encoder is not None:
        params["sid_encoder"] = jax.tree.map(lambda x: 20 * x, params["sid_encoder"])
        state = state._replace(memory=(50 * state.memory).astype(state.memory.dtype))
    if "item_head" in params:
        params["item_head"] = jax.tree.map(lambda x: 30 * x, params["item_head"])
    state = state._replace(params=params)
    run = Run(folder)
    run.claim(config, DataDescription.of(data, config.data))
    with Checkpoints(folder, keep=1) as checkpoints:
        checkpoints.save(0, to_parts(spec, state), {})
    return run
