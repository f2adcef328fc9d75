"""What training really sees: packed rows as the SIDs, items and titles that they are made of."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import tokenizers

from prefixmem_jax.config import Config
from prefixmem_jax.data.batch import Batch
from prefixmem_jax.data.pipeline import rows_of_batch
from prefixmem_jax.data.prepare import PreparedData, prepare_data
from prefixmem_jax.data.texts import read_tokenizer
from prefixmem_jax.errors import UserError
from prefixmem_jax.progress import counted
from prefixmem_jax.text import shortened
from prefixmem_jax.training_rows import training_source


def inspect(
    config: Config, documents: int, say: Callable[[str], None], batch: int | None = None
) -> None:
    """Says how much a config's data are, and shows documents of the first rows.

    Args:
      documents: how many.
      say: called with each line.
      batch: show those of the batch of this step, from 1, in place of the first rows.

    Raises:
      UserError: the config's objective does not learn from sequences of tokens.
    """
    if not isinstance(config.objective.abstract_batch(config.data), Batch):
        raise UserError("data inspect: this objective's examples are no sequences of tokens")
    data = prepare_data(config.data)
    source, split = training_source(config, data), data.split
    length = config.data.sequence_length
    within = real = predicted = 0
    for number in counted(range(len(source)), "reading what training sees", "row"):
        row = source[number]
        within += int(row.segment_ids.max())
        real += int((row.segment_ids > 0).sum())
        predicted += int((row.loss_mask > 0).sum())
    say(
        f"{shortened(data.dataset.name)}: {len(data.catalog):,} items, "
        f"{len(data.dataset.histories):,} users; {len(split.validation):,} validation and "
        f"{len(split.test):,} test examples"
    )
    say(
        f"packed: {len(source):,} rows of {length} tokens, {within:,} documents; "
        f"{1 - real / (len(source) * length):.1%} is padding, {predicted:,} tokens are predicted"
    )
    tokenizer = None
    if config.data.tokenizer is not None:
        tokenizer, _ = read_tokenizer(config.data.tokenizer)
    shown, numbers = 0, range(len(source))
    if batch is not None:
        numbers = rows_of_batch(batch, len(source), config.data.batch_size, config.seed)
    for number in numbers:
        row = source[number]
        for segment in range(1, row.segment_ids.max() + 1):
            if shown == documents:
                return
            here = row.segment_ids == segment
            say(f"\nrow {number}, document {segment}: {here.sum()} tokens")
            for line in _lines(data, row.tokens[here], row.loss_mask[here], tokenizer):
                say(f"  {line}")
            shown += 1


def _lines(
    data: PreparedData,
    tokens: np.ndarray,
    mask: np.ndarray,
    tokenizer: tokenizers.Tokenizer | None,
) -> list[str]:
    """One line for each SID and each text; what is not predicted stands in brackets."""
    vocabulary, catalog = data.vocabulary, data.catalog
    text = vocabulary.is_text(tokens)
    levels, codes = (np.asarray(x) for x in vocabulary.level_and_code(tokens))
    predicted = np.concatenate([[0], mask[:-1]]) > 0
    lines, at = [], 0
    while at < len(tokens):
        if text[at] and tokenizer is not None:
            same = (text[at:] & (predicted[at:] == predicted[at])).argmin() or len(tokens) - at
            said = tokenizer.decode(tokens[at : at + same].tolist(), skip_special_tokens=False)
            lines.append(shortened(repr(said) if predicted[at] else f"[{said!r}]", 100))
            at += same
            continue
        if levels[at] != 1:
            lines.append("BOS" if tokens[at] == vocabulary.bos_token else f"token {tokens[at]}")
            at += 1
            continue
        stop = at + vocabulary.levels
        sid = "-".join(
            f"{code}" if known else f"[{code}]"
            for code, known in zip(codes[at:stop], predicted[at:stop], strict=True)
        )
        items = catalog.items_of_group(int(catalog.groups(codes[None, at:stop])[0]))
        names = [
            f"item {catalog.key(item)} {shortened(catalog.titles[item] or '', 50)}".strip()
            for item in items[:2].tolist()
        ]
        more = f", and {len(items) - 2} more" if len(items) > 2 else ""
        lines.append(f"{sid:<24s}  {' or '.join(names)}{more}")
        at = stop
    return lines
