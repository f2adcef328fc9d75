"""Vectors of titles by a text encoder: a local sentence-transformers or transformers folder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from prefixmem_jax.errors import UserError
from prefixmem_jax.files import read_json_list, read_json_object
from prefixmem_jax.progress import progress_bar
from prefixmem_jax.semantic_ids.vectors import Vectors

BATCH, LONGEST = 64, 256


@dataclass(frozen=True)
class _Encoder:
    """Where the transformer lies, and what becomes of its hidden states.

    Attributes:
      pooling: `mean` over the tokens, the first (`cls`), or the last (`lasttoken`).
    """

    folder: Path
    pooling: str = "mean"
    normalize: bool = False


def embed_titles(folder: str | Path, titles: Sequence[str | None], out: Path) -> Vectors:
    """One vector for each title.

    Args:
      folder: of sentence-transformers, whose pooling and normalisation are followed, or of
        transformers alone: then the mean over the tokens. Nothing is fetched from elsewhere.
      out: gets the vectors, which need not fit in memory.

    Raises:
      UserError: no such model there, a part that is not supported, or no torch.
    """
    try:
        import torch
    except ImportError:
        raise UserError(f"text_model={folder}: needs torch (pip install torch)") from None
    import transformers

    encoder = _read(Path(folder))
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            encoder.folder, local_files_only=True
        )
        model = transformers.AutoModel.from_pretrained(encoder.folder, local_files_only=True)
    except Exception as error:  # whatever transformers makes of a folder that is none
        raise UserError(f"{folder}: no text encoder ({' '.join(str(error).split())})") from None
    model.eval()
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "right"
    texts = [title or "-" for title in titles]  # without any token there would be no vector
    by_length = np.argsort([len(text) for text in texts], kind="stable")
    array = None
    with progress_bar(len(texts), "titles", "title") as bar, torch.inference_mode():
        for first in range(0, len(texts), BATCH):
            items = by_length[first : first + BATCH]
            tokens = tokenizer(
                [texts[item] for item in items],
                padding=True,
                truncation=True,
                max_length=min(LONGEST, tokenizer.model_max_length),
                return_tensors="pt",
            )
            pooled = _pooled(encoder, model(**tokens).last_hidden_state, tokens.attention_mask)
            if array is None:
                shape = (len(texts), pooled.shape[1])
                array = np.lib.format.open_memmap(out, "w+", np.float32, shape)
            array[items] = pooled.float().numpy()
            bar.update(len(items))
    return Vectors(array, None, f"{folder}: titles")


def _pooled(encoder: _Encoder, hidden: Any, mask: Any) -> Any:
    """One vector [B, D] of hidden states [B, S, D], of which `mask` [B, S] says which are real."""
    weights = mask.unsqueeze(-1).to(hidden.dtype)
    if encoder.pooling == "mean":
        pooled = (hidden * weights).sum(1) / weights.sum(1).clamp(min=1e-9)
    elif encoder.pooling == "cls":
        pooled = hidden[:, 0]
    else:
        last = mask.sum(1).clamp(min=1) - 1
        pooled = hidden[range(len(hidden)), last]
    if encoder.normalize:
        pooled = pooled / pooled.norm(dim=1, keepdim=True).clamp(min=1e-12)
    return pooled


def _read(folder: Path) -> _Encoder:
    """What a folder says of itself."""
    if not (folder / "modules.json").is_file():
        if not (folder / "config.json").is_file():
            raise UserError(f"{folder}: no config.json; expected the folder of a text encoder")
        return _Encoder(folder)
    found = _Encoder(folder)
    for module in read_json_list(folder / "modules.json"):
        kind, path = str(module.get("type", "")).rpartition(".")[2], str(module.get("path", ""))
        if kind == "Transformer":
            found = _Encoder(folder / path, found.pooling, found.normalize)
        elif kind == "Pooling":
            found = _Encoder(found.folder, _pooling(folder / path / "config.json"), found.normalize)
        elif kind == "Normalize":
            found = _Encoder(found.folder, found.pooling, True)
        else:
            raise UserError(
                f"{folder / 'modules.json'}: {kind} is not supported; Transformer, Pooling and "
                "Normalize are"
            )
    return found


def _pooling(path: Path) -> str:
    names = {
        "pooling_mode_mean_tokens": "mean",
        "pooling_mode_cls_token": "cls",
        "pooling_mode_lasttoken": "lasttoken",
    }
    chosen = [
        key
        for key, value in read_json_object(path).items()
        if value is True and key.startswith("pooling_mode")
    ]
    if len(chosen) != 1 or chosen[0] not in names:
        raise UserError(f"{path}: pools by {chosen}; expected one of {', '.join(names)}")
    return names[chosen[0]]
