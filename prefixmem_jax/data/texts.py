"""Items' titles in tokens, and the tokenizers that make them."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import tokenizers

from prefixmem_jax.config_groups import DataConfig
from prefixmem_jax.errors import UserError
from prefixmem_jax.files import read_json_object, sha256_of
from prefixmem_jax.semantic_ids.catalog import Catalog

TOKENIZER, CONFIG = "tokenizer.json", "tokenizer_config.json"
END = "<|end|>"
# Titles that are tokenized at a time.
_PIECE = 100_000


@dataclass(frozen=True)
class ItemTexts:
    """Texts of all items, one after the other.

    Attributes:
      tokens: int32 [tokens].
      offsets: int64 [items + 1]; item i's are tokens[offsets[i]:offsets[i + 1]], none where it has
        no title.
      tokenizer: that made them.
      end: the token that ends a text, or None.
    """

    tokens: np.ndarray
    offsets: np.ndarray
    tokenizer: tokenizers.Tokenizer
    end: int | None

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of every item's text, int64 [items]."""
        return np.diff(self.offsets)

    def encode(self, text: str) -> list[int]:
        """Another text's tokens, nothing added."""
        return self.tokenizer.encode(text, add_special_tokens=False).ids


@lru_cache(maxsize=1)  # many parts of one corpus ask for the same
def item_texts(catalog: Catalog, config: DataConfig) -> ItemTexts:
    """The first `config.text_length` tokens of every title.

    Raises:
      UserError: no tokenizer is named, it is none, or it has more tokens than the vocabulary.
    """
    if config.tokenizer is None:
        raise UserError(
            "objective.documents: documents with text need data.tokenizer, the folder of a "
            "tokenizer (`prefixmem data tokenizer` makes one)"
        )
    tokenizer, end = read_tokenizer(config.tokenizer)
    size = tokenizer.get_vocab_size()
    if size > config.text_tokens:
        raise UserError(
            f"{config.tokenizer}: its tokenizer has {size} tokens, data.text_tokens="
            f"{config.text_tokens}; expected {size} or more"
        )
    pieces, lengths = [np.zeros(0, np.int32)], []
    for start in range(0, len(catalog), _PIECE):
        titles = [title or "" for title in catalog.titles[start : start + _PIECE]]
        for encoded in tokenizer.encode_batch_fast(titles, add_special_tokens=False):
            ids = encoded.ids[: config.text_length]
            pieces.append(np.asarray(ids, np.int32))
            lengths.append(len(ids))
    offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths, dtype=np.int64)])
    return ItemTexts(np.concatenate(pieces), offsets, tokenizer, end)


def read_tokenizer(folder: str | Path) -> tuple[tokenizers.Tokenizer, int | None]:
    """The tokenizer in a folder as transformers writes it, and the token that ends a text."""
    path = _tokenizer_file(folder)
    try:
        tokenizer = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises nothing more special
        raise UserError(f"{path}: makes no tokenizer ({' '.join(str(error).split())})") from None
    tokenizer.no_truncation()
    tokenizer.no_padding()
    described = Path(folder) / CONFIG
    end = read_json_object(described).get("eos_token") if described.is_file() else None
    name = end.get("content") if isinstance(end, dict) else end
    return tokenizer, None if name is None else tokenizer.token_to_id(str(name))


def tokenizer_sha256(folder: str | Path) -> str:
    """Digest of the tokenizer in a folder."""
    return sha256_of(_tokenizer_file(folder)).hex()


def _tokenizer_file(folder: str | Path) -> Path:
    path = Path(folder) / TOKENIZER
    if not path.is_file():
        raise UserError(f"{folder}: no tokenizer there; expected {TOKENIZER}")
    return path


def train_tokenizer(texts: Iterable[str], tokens: int) -> tokenizers.Tokenizer:
    """Byte-level BPE of at most so many tokens, of which one ends texts."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=tokens,
        special_tokens=[END],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def write_tokenizer(tokenizer: tokenizers.Tokenizer, folder: Path) -> None:
    """Writes it as transformers reads it."""
    tokenizer.save(str(folder / TOKENIZER))
    described = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": END}
    (folder / CONFIG).write_text(json.dumps(described, indent=2) + "\n")
