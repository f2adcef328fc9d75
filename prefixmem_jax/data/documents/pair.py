"""One item's title and SID, either way round: `BOS, title, SID` and `BOS, SID, title, end`."""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np

from prefixmem_jax.data.documents.document import (
    Corpus,
    Documents,
    DocumentsConfig,
    Pool,
    Predicted,
)
from prefixmem_jax.data.splits import Ranges
from prefixmem_jax.errors import UserError


@dataclass(frozen=True)
class Pair(DocumentsConfig):
    """Every item with a title, once by each template (paper, "Method", type 2).

    A title that stands last is followed by the token that ends a text, if the tokenizer has one.

    Attributes:
      templates: text with `{title}` and `{sid}` in it, which is not predicted itself.
      predicted: what is predicted: `everything`, or `sids`, or `text` alone.
    """

    templates: tuple[str, ...] = ("{title}{sid}", "{sid}{title}")
    predicted: Predicted = "everything"

    def documents(self, corpus: Corpus, rng: np.random.Generator) -> Documents:
        del rng
        texts, levels = corpus.texts, corpus.data.vocabulary.levels
        templates = [_pieces(template) for template in self.templates]
        literals = sorted({text for pieces in templates for text in pieces} - {"{title}", "{sid}"})
        end = [] if texts.end is None else [texts.end]
        pool = Pool(corpus, end, *map(texts.encode, literals))
        titled = np.flatnonzero(texts.lengths)
        items = titled[corpus.share(len(titled))]
        starts, stops, per_document, predicted = [], [], [], []
        for pieces in templates:
            columns = [pool.bos(len(items))]
            learnt = [False]
            for piece in pieces:
                if piece == "{title}":
                    columns.append(pool.texts(items))
                elif piece == "{sid}":
                    columns.append(pool.sids(items))
                else:
                    columns.append(pool.other(1 + literals.index(piece), len(items)))
                kind = {"{title}": "text", "{sid}": "sids"}.get(piece)
                learnt.append(kind is not None and self.predicted in ("everything", kind))
            if pieces[-1] == "{title}":
                columns.append(pool.other(0, len(items)))
                learnt.append(learnt[-1])
            starts.append(np.stack([column.starts for column in columns], axis=1).reshape(-1))
            stops.append(np.stack([column.stops for column in columns], axis=1).reshape(-1))
            per_document.append(np.full(len(items), len(columns)))
            predicted.append(np.tile(learnt, len(items)))
        ranges = Ranges(np.concatenate(starts), np.concatenate(stops))
        documents = pool.documents(
            ranges,
            np.concatenate(per_document),
            np.concatenate(predicted),
            np.zeros(len(ranges), np.int64),  # the title tells which item it is, or is to be told
        )
        longest = int(documents.lengths.max(initial=0))
        if longest > corpus.config.sequence_length:
            raise UserError(
                f"data.sequence_length={corpus.config.sequence_length} is too short: a title and "
                f"its SID of {levels} codes need {longest} tokens"
            )
        return documents


def _pieces(template: str) -> list[str]:
    """A template's placeholders and the texts between them."""
    pieces = [piece for piece in re.split(r"(\{title\}|\{sid\})", template) if piece]
    if sorted(piece for piece in pieces if piece in ("{title}", "{sid}")) != ["{sid}", "{title}"]:
        raise UserError(
            f"objective.documents: template {template!r}: expected {{title}} and {{sid}}, each once"
        )
    return pieces
