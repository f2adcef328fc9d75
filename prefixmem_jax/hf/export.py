"""Writing a model as a Hugging Face folder that opens without this package.

With a SID encoder the folder brings its own modelling code (`exported/`); without one it is a
stock Qwen3, Llama or Gemma 3. Both have a tokenizer, the catalogue (`items.jsonl`) and code that
generates its SIDs (`sid_catalog.py`).
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import transformers
from tqdm import tqdm

from prefixmem_jax.config import DecoderConfig, PrefixMemoryConfig
from prefixmem_jax.hf.families import (
    ModelFolder,
    differing_key,
    huggingface_config,
    read_folder,
)
from prefixmem_jax.hf.mapping import Weight, table_names, weights
from prefixmem_jax.hf.safetensors_files import SafetensorsWriter
from prefixmem_jax.hf.tokenizer import sid_tokenizer
from prefixmem_jax.memory.encoder import make_hash, tables_of
from prefixmem_jax.semantic_ids.catalog import Catalog

CODE = ("configuration_prefixmem.py", "modeling_prefixmem.py", "sid_catalog.py")
STOCK_CODE = ("sid_catalog.py",)
DTYPES = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16)}
PIECE_BYTES = 32 << 20  # of the memory that are on the host at a time

# Rows start..stop-1 of the memory as `memory.table.Table` keeps them, [lines, numbers per line].
ReadLines = Callable[[int, int], np.ndarray]


@dataclass(frozen=True)
class ModelToExport:
    """Everything that an exported folder is made of.

    Attributes:
      params: parts `llm` and, with an encoder, `encoder`.
      lines: shape and dtype of the memory's array; `read_lines` reads a range of its lines.
      text_model: Hugging Face folder that the LLM and its tokenizer came from, if any.
      max_positions: longest sequence it was trained on, where there is no `text_model` to say.
    """

    decoder: DecoderConfig
    encoder: PrefixMemoryConfig | None
    catalog: Catalog
    params: Mapping[str, Any]
    lines: Any
    read_lines: ReadLines | None
    text_model: str | None
    max_positions: int


def write_folder(
    folder: Path, model: ModelToExport, dtype: str | None, max_shard_bytes: int, card: str
) -> None:
    """Writes all files into an empty folder, weights a piece at a time.

    Args:
      dtype: of the weights; None keeps each as it was trained.
      card: the model card, README.md.
    """
    described = None if model.text_model is None else read_folder(model.text_model)
    config = None if described is None else described.config
    tokenizer = sid_tokenizer(model.catalog.space, model.text_model, config)
    stock = _stock_config(model, described)
    tokenizer.save_pretrained(folder)
    _write_configs(folder, model, stock, tokenizer, dtype or "float32")
    for name in CODE if model.encoder is not None else STOCK_CODE:
        source = resources.files("prefixmem_jax.hf") / "exported" / name
        (folder / name).write_text(source.read_text())
    with (folder / "items.jsonl").open("w", encoding="utf-8") as file:
        listed = zip(model.catalog.sids.tolist(), model.catalog.titles, strict=True)
        for item, (sid, title) in enumerate(listed):
            entry = {"item": item, "sid": sid, "title": title}
            file.write(json.dumps(entry, ensure_ascii=False) + "\n")
    (folder / "README.md").write_text(card, encoding="utf-8")
    _write_weights(folder, model, dtype, max_shard_bytes)


def copy_all_but_weights(source: Path, target: Path) -> None:
    """The small files of a Hugging Face folder: configs, tokenizer, code, catalogue."""
    weights_end = (".safetensors", ".safetensors.index.json", ".bin", ".pth", ".gguf")
    for path in source.iterdir():
        if path.is_file() and not path.name.endswith(weights_end):
            shutil.copyfile(path, target / path.name)


def _stock_config(
    model: ModelToExport, described: ModelFolder | None
) -> transformers.PretrainedConfig:
    """The config of the LLM alone, with the vocabulary that it has now."""
    vocabulary = model.catalog.space.vocabulary_size
    if described is not None and differing_key(described.decoder, model.decoder) is None:
        described.config.vocab_size = vocabulary
        return described.config
    return huggingface_config(model.decoder, vocabulary, model.max_positions)


def _write_configs(
    folder: Path,
    model: ModelToExport,
    stock: transformers.PretrainedConfig,
    tokenizer: transformers.PreTrainedTokenizerBase,
    dtype: str,
) -> None:
    space = model.catalog.space
    stock.dtype = dtype
    stock.pad_token_id = tokenizer.pad_token_id
    content = stock.to_dict()
    content.pop("_name_or_path", None)
    content["architectures"] = [_ARCHITECTURES[stock.model_type]]
    sids = {"codebook_sizes": list(space.codebook_sizes), "text_tokens": space.text_tokens}
    if model.encoder is None:
        content["semantic_ids"] = sids
    else:
        memory = dict(vars(model.encoder))
        memory["multipliers"] = make_hash(model.encoder, space)["multipliers"].tolist()
        content = {
            "architectures": ["PrefixMemForCausalLM"],
            "auto_map": {
                "AutoConfig": "configuration_prefixmem.PrefixMemConfig",
                "AutoModelForCausalLM": "modeling_prefixmem.PrefixMemForCausalLM",
            },
            "dtype": dtype,
            "model_type": "prefixmem",
            "pad_token_id": stock.pad_token_id,
            "prefix_memory": memory,
            "semantic_ids": sids,
            "text_config": content,
            "tie_word_embeddings": bool(stock.tie_word_embeddings),
            "transformers_version": transformers.__version__,
        }
    _write_json(folder / "config.json", content)
    # One SID, greedily; a text model's own habits (sampling, penalties) are not taken over.
    generation = {
        "do_sample": False,
        "eos_token_id": stock.eos_token_id,
        "max_new_tokens": space.levels,
        "pad_token_id": stock.pad_token_id,
        "transformers_version": transformers.__version__,
    }
    _write_json(folder / "generation_config.json", generation)


_ARCHITECTURES = {
    "qwen3": "Qwen3ForCausalLM",
    "llama": "LlamaForCausalLM",
    "gemma3_text": "Gemma3ForCausalLM",
}


def _write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")


def _write_weights(
    folder: Path, model: ModelToExport, dtype: str | None, max_shard_bytes: int
) -> None:
    table = weights(model.decoder, model.encoder)
    tensors: dict[str, tuple[tuple[int, ...], np.dtype]] = {}
    for weight, name, array, layer in _dense(table, model):
        kept = DTYPES[dtype] if dtype else np.dtype(array.dtype)
        shape = array.shape if layer is None else array.shape[1:]
        tensors[name] = (weight.hf_shape(shape), kept)
    if model.encoder is not None:
        width = model.encoder.d_mem // model.encoder.heads
        kept = DTYPES[dtype or model.encoder.dtype]
        tensors |= dict.fromkeys(table_names(model.encoder), ((model.encoder.rows, width), kept))
    writer = SafetensorsWriter(folder, tensors, max_shard_bytes)
    for weight, name, array, layer in _dense(table, model):
        one = array if layer is None else array[layer]
        writer.tensor(name)[...] = weight.to_hf(np.asarray(one))
    if model.encoder is not None:
        _write_tables(writer, model)


def _dense(
    table: list[Weight], model: ModelToExport
) -> Iterable[tuple[Weight, str, Any, int | None]]:
    """Every dense weight: its name, our array, and the layer of it (None: all of it)."""
    for weight in table:
        array: Any = model.params
        for key in weight.path:
            array = array[key]
        if weight.per_layer:
            for layer in range(array.shape[0]):
                yield weight, weight.name.format(layer=layer), array, layer
        else:
            yield weight, weight.name, array, None


def _write_tables(writer: SafetensorsWriter, model: ModelToExport) -> None:
    """Deals the rows of our one array out to the tables, some lines at a time."""
    encoder, tables = model.encoder, tables_of(model.encoder)
    width = encoder.d_mem // encoder.heads
    pack = model.lines.shape[1] // width
    # A multiple of both a line and a row of every table.
    step = max(1, PIECE_BYTES // (tables * width * 4)) * tables
    lines = -(-encoder.rows * tables // pack)
    for first in tqdm(range(0, lines, step), desc="memory", unit="part", leave=False):
        last = min(first + step, lines)
        flat = model.read_lines(first, last).reshape(-1, width)
        start = first * pack // tables
        count = min(-(-len(flat) // tables), encoder.rows - start)
        for table, name in enumerate(table_names(encoder)):
            rows = flat[table::tables][:count]
            writer.tensor(name)[start : start + len(rows)] = rows
