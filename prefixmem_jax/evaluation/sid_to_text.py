"""SID-to-text: does the model know what a SID names? BLEU of what it writes against titles."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from prefixmem_jax.data.prepare import fixed_sample
from prefixmem_jax.evaluation.metrics import bleu
from prefixmem_jax.inference.engine import Engine

ITEMS = 1000
NEW_TOKENS = 32


def title_bleu(engine: Engine, text_model: str | None) -> float | None:
    """BLEU over a fixed sample of titled items, of text generated greedily after BOS and the SID.

    Other tokens than text are left out of what is written. None where the run has no text
    vocabulary or tokenizer, or the items no titles.

    Args:
      text_model: Hugging Face folder that the LLM came from.
    """
    titles = engine.catalog.titles
    titled = np.array([item for item, title in enumerate(titles) if title], np.int64)
    if text_model is None or not len(titled) or not (Path(text_model) / "config.json").is_file():
        return None
    from prefixmem_jax.hf.families import read_folder  # only here: transformers is slow to import
    from prefixmem_jax.hf.tokenizer import text_tokenizer

    tokenizer = text_tokenizer(text_model, read_folder(text_model).config)
    if tokenizer is None:
        return None
    items = titled[fixed_sample(len(titled), ITEMS)]
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    written = engine.describe_items(items, NEW_TOKENS, end)
    is_text = engine.spec.vocabulary.is_text(written)
    texts = [_decoded(tokenizer, row[text]) for row, text in zip(written, is_text, strict=True)]
    return bleu(texts, [titles[item] for item in items])


def _decoded(tokenizer, tokens: np.ndarray) -> str:
    return tokenizer.decode(tokens.tolist(), skip_special_tokens=True).strip()
