"""SID-to-text: does the model know what a SID names? BLEU of what it writes against titles."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from prefixmem_jax.data.prepare import fixed_sample
from prefixmem_jax.evaluation.metrics import bleu
from prefixmem_jax.inference.engine import Recommender
from prefixmem_jax.training.initialise import text_model_of

ITEMS = 1000
NEW_TOKENS = 32


def title_bleu(recommender: Recommender) -> float | None:
    """BLEU over a fixed sample of titled items, of text generated greedily after BOS and the SID.

    Other tokens than text are left out of what is written. None where the run has no text
    vocabulary or tokenizer, or the items no titles.
    """
    folder = text_model_of(recommender.config)
    titles = recommender.data.catalog.titles
    titled = [item for item, title in enumerate(titles) if title]
    if folder is None or not titled or not (Path(folder) / "config.json").is_file():
        return None
    from prefixmem_jax.hf.families import read_folder  # only here: transformers is slow to import
    from prefixmem_jax.hf.tokenizer import text_tokenizer

    tokenizer = text_tokenizer(folder, read_folder(folder).config)
    if tokenizer is None:
        return None
    items = fixed_sample(titled, ITEMS)
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    written = recommender.describe_items(items, NEW_TOKENS, end)
    text_tokens = recommender.data.catalog.space.text_tokens
    texts = [_decoded(tokenizer, row[(row >= 0) & (row < text_tokens)]) for row in written]
    return bleu(texts, [titles[item] for item in items])


def _decoded(tokenizer, tokens: np.ndarray) -> str:
    return tokenizer.decode(tokens.tolist(), skip_special_tokens=True).strip()
