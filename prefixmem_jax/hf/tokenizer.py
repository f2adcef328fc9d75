"""Tokenizers that speak Semantic IDs.

The token of level l (1-based) and code c is written `<|sid_l_c|>`, padding and BOS `<|sid_pad|>`
and `<|sid_bos|>`. Where the text tokenizer has fewer tokens than the model, `<|unused_i|>` fill the
gap.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import tokenizers
import transformers

from prefixmem_jax.errors import UserError
from prefixmem_jax.files import read_json_object
from prefixmem_jax.semantic_ids.vocabulary import Vocabulary

CONFIG, TOKENIZER = "tokenizer_config.json", "tokenizer.json"
VOCABULARY_FILES = (TOKENIZER, "tokenizer.model", "vocab.json", "vocab.txt")
JSON_FILES = (CONFIG, TOKENIZER, "special_tokens_map.json", "added_tokens.json", "vocab.json")
PAD, BOS = "<|sid_pad|>", "<|sid_bos|>"


def token_names(vocabulary: Vocabulary) -> list[str]:
    """Names of padding, BOS and every SID token, in the order of their ids."""
    codes = enumerate(vocabulary.space.codebook_sizes, start=1)
    return [PAD, BOS, *(f"<|sid_{level}_{code}|>" for level, size in codes for code in range(size))]


def text_tokenizer(
    folder: str | Path, config: transformers.PretrainedConfig | None = None
) -> transformers.PreTrainedTokenizerBase | None:
    """The tokenizer of a model folder, or None where it has none; `config` is the stock model's."""
    if not (Path(folder) / CONFIG).is_file():
        return None
    return open_tokenizer(folder, config=config)


def open_tokenizer(folder: str | Path, **options: Any) -> transformers.PreTrainedTokenizerBase:
    """What `AutoTokenizer` makes of a folder.

    Raises:
      UserError: no vocabulary there, of which it would make a tokenizer without text; or a file is
        damaged, which is named.
    """
    folder = Path(folder)
    if not any((folder / name).is_file() for name in VOCABULARY_FILES):
        raise UserError(
            f"{folder}: no tokenizer there; expected one of {', '.join(VOCABULARY_FILES)}"
        )
    for name in JSON_FILES:
        if (folder / name).is_file():
            read_json_object(folder / name)
    try:
        return transformers.AutoTokenizer.from_pretrained(folder, **options)
    except Exception as error:  # the tokenizers library raises nothing more special
        raise _tokenizer_error(folder, error) from None


def _tokenizer_error(folder: Path, error: Exception) -> UserError:
    """Names the file: transformers reads several, and does not say which one it cannot use."""
    path = folder / CONFIG
    if (folder / TOKENIZER).is_file():
        try:
            tokenizers.Tokenizer.from_file(str(folder / TOKENIZER))
        except Exception as inner:
            path, error = folder / TOKENIZER, inner
    return UserError(f"{path}: makes no tokenizer ({' '.join(str(error).split())})")


def sid_tokenizer(
    vocabulary: Vocabulary, text: str | Path | None, config: transformers.PretrainedConfig | None
) -> transformers.PreTrainedTokenizerBase:
    """The tokenizer in a folder, extended with the vocabulary's SID tokens.

    Args:
      text: folder of the text tokenizer; None where the model has no text tokens.
      config: of the stock model there.

    Raises:
      UserError: no tokenizer there, or one with more tokens than the model's text vocabulary.
    """
    if text is None:
        return _without_text(vocabulary)
    # Decoders are prompted from the left; set afterwards, it would not be saved.
    tokenizer = open_tokenizer(text, config=config, padding_side="left")
    names, have = token_names(vocabulary), len(tokenizer)
    if BOS not in tokenizer.get_vocab():
        if have > vocabulary.text_tokens:
            raise UserError(
                f"{text}: its tokenizer has {have} tokens, the model was trained with "
                f"data.text_tokens={vocabulary.text_tokens}"
            )
        unused = [f"<|unused_{token}|>" for token in range(have, vocabulary.text_tokens)]
        tokenizer.add_tokens([_added(name) for name in (*unused, *names)])
    expected = list(range(vocabulary.pad_token, vocabulary.used))
    if tokenizer.convert_tokens_to_ids(names) != expected:
        raise UserError(f"{text}: its tokenizer has SID tokens already, and other ones")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = PAD
    return tokenizer


def save_tokenizer(tokenizer: transformers.PreTrainedTokenizerBase, folder: Path) -> None:
    """Writes its files; OSError where that fails, for the tokenizers library has its own."""
    try:
        tokenizer.save_pretrained(folder)
    except Exception as error:
        raise OSError(f"{folder / TOKENIZER}: {error}") from None


def _without_text(vocabulary: Vocabulary) -> transformers.PreTrainedTokenizerBase:
    names = token_names(vocabulary)
    model = tokenizers.models.WordLevel({name: i for i, name in enumerate(names)}, unk_token=PAD)
    inner = tokenizers.Tokenizer(model)
    inner.add_tokens([_added(name) for name in names])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token=PAD, bos_token=BOS, padding_side="left"
    )


def _added(name: str) -> tokenizers.AddedToken:
    return tokenizers.AddedToken(name, normalized=False)
