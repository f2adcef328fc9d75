"""SID-to-text: does the model know what a SID names? BLEU of what it writes against titles."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from prefixmem_jax.data.prepare import fixed_sample
from prefixmem_jax.data.texts import TOKENIZER, read_tokenizer
from prefixmem_jax.evaluation.metrics import bleu
from prefixmem_jax.inference.engine import Engine

ITEMS = 1000
NEW_TOKENS = 32


def title_bleu(engine: Engine, text_model: str | None) -> float | None:
    """BLEU over a fixed sample of titled items, of text generated greedily after BOS and the SID.

    Other tokens than text are left out of what is written. None where there is no text, or
    the items have no titles.

    Args:
      text_model: folder with the text tokenizer.
    """
    titles = engine.catalog.titles
    titled = np.array([item for item, title in enumerate(titles) if title], np.int64)
    speaks = engine.spec.vocabulary.text_tokens and text_model is not None
    if not (speaks and len(titled) and (Path(text_model) / TOKENIZER).is_file()):
        return None
    tokenizer, end = read_tokenizer(text_model)
    items = titled[fixed_sample(len(titled), ITEMS)]
    written = engine.describe_items(items, NEW_TOKENS, [] if end is None else [end])
    is_text = engine.spec.vocabulary.is_text(written)
    texts = [
        tokenizer.decode(row[text].tolist()).strip()
        for row, text in zip(written, is_text, strict=True)
    ]
    return bleu(texts, [titles[item] for item in items])
