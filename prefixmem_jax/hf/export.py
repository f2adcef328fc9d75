"""Writing a model as a Hugging Face folder that opens without this package.

With a SID encoder or an item head the folder brings its own modelling code (`exported/`); without
either it is a stock Qwen3, Llama or Gemma 3. Both have a tokenizer, the catalogue (`items.jsonl`)
and code that generates its SIDs (`sid_catalog.py`).
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

from prefixmem_jax.config import Config
from prefixmem_jax.files import MANIFEST
from prefixmem_jax.hf.families import differing_key, huggingface_config, read_folder
from prefixmem_jax.hf.mapping import Architecture, Weight, table_names, weights
from prefixmem_jax.hf.safetensors_files import SafetensorsWriter
from prefixmem_jax.hf.tokenizer import save_tokenizer, sid_tokenizer
from prefixmem_jax.progress import counted
from prefixmem_jax.semantic_ids.catalog import Catalog
from prefixmem_jax.semantic_ids.vocabulary import Vocabulary

CODE = ("configuration_prefixmem.py", "modeling_prefixmem.py", "sid_catalog.py")
STOCK_CODE = ("sid_catalog.py",)
DTYPES = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16)}
PIECE_BYTES = 32 << 20  # of the memory that are on the host at a time

# Rows start..stop-1 of the memory as `memory.table.Table` keeps them, [lines, numbers per line].
ReadLines = Callable[[int, int], np.ndarray]


@dataclass(frozen=True)
class Parameters:
    """A model's numbers, and what model they are of.

    Attributes:
      dense: by part.
      lines: shape of the memory's array; `read_lines` reads a range of its lines.
    """

    model: Architecture
    dense: Mapping[str, Any]
    lines: tuple[int, int] | None = None
    read_lines: ReadLines | None = None


def write_folder(
    folder: Path,
    parameters: Parameters,
    catalog: Catalog,
    vocabulary: Vocabulary,
    text_model: str | None,
    config: Config,
    card: str,
    dtype: str | None,
    max_shard_bytes: int,
) -> None:
    """Writes all files into an empty folder.

    Args:
      text_model: folder of the text tokenizer; with a config.json, that the LLM came from too.
      config: of the run: its longest sequence, where there is no `text_model` to say, and how its
        recommendations are searched for.
      card: the model card, README.md.
      dtype, max_shard_bytes: see `write_weights`.
    """
    model, decoder = parameters.model, parameters.model.decoder
    described = None
    if text_model is not None and (Path(text_model) / "config.json").is_file():
        described = read_folder(text_model)
    if described is not None and differing_key(described.decoder, decoder) is None:
        stock = described.config
        stock.vocab_size = vocabulary.size
    else:
        stock = huggingface_config(decoder, vocabulary.size, config.data.sequence_length)
    tokenizer = sid_tokenizer(
        vocabulary, text_model, None if described is None else described.config
    )
    save_tokenizer(tokenizer, folder)
    stock.pad_token_id = tokenizer.pad_token_id
    sids = {
        "codebook_sizes": list(vocabulary.space.codebook_sizes),
        "text_tokens": vocabulary.text_tokens,
        "items": len(catalog),
        "max_items": config.data.max_items,
        "beam": config.evaluation.beam,
        "item_share": config.evaluation.item_share,
        "transition_share": config.evaluation.transition_share,
    }
    _write_configs(folder, model, vocabulary, stock, sids, dtype or "float32")
    for name in STOCK_CODE if model.is_stock else CODE:
        source = resources.files("prefixmem_jax.hf") / "exported" / name
        (folder / name).write_text(source.read_text())
    # What UTF-8 cannot say (half a surrogate pair) becomes `\\ud800`, which JSON reads.
    with (folder / "items.jsonl").open("w", encoding="utf-8", errors="backslashreplace") as file:
        listed = zip(catalog.sids.tolist(), catalog.titles, strict=True)
        for item, (sid, title) in enumerate(listed):
            entry = {"item": item, "sid": sid, "title": title}
            if catalog.keys is not None:
                entry["key"] = catalog.keys[item]
            file.write(json.dumps(entry, ensure_ascii=False) + "\n")
    (folder / "README.md").write_text(card, encoding="utf-8", errors="backslashreplace")
    write_weights(folder, parameters, dtype, max_shard_bytes)


def copy_all_but_weights(source: Path, target: Path) -> None:
    """The small files of a Hugging Face folder: configs, tokenizer, code, catalogue."""
    weights_end = (".safetensors", ".safetensors.index.json", ".bin", ".pth", ".gguf")
    for path in source.iterdir():
        if path.is_file() and path.name != MANIFEST and not path.name.endswith(weights_end):
            shutil.copyfile(path, target / path.name)


def _write_configs(
    folder: Path,
    model: Architecture,
    vocabulary: Vocabulary,
    stock: transformers.PretrainedConfig,
    sids: dict[str, Any],
    dtype: str,
) -> None:
    stock.dtype = dtype
    content = stock.to_dict()
    content.pop("_name_or_path", None)
    content["architectures"] = [_ARCHITECTURES[stock.model_type]]
    if model.is_stock:
        content["semantic_ids"] = sids
    else:
        memory = head = None
        if model.sid_encoder is not None:
            memory = dict(vars(model.sid_encoder))
            memory["multipliers"] = model.sid_encoder.multipliers(vocabulary.space).tolist()
        if model.item_head is not None:
            head = dict(vars(model.item_head))
            if model.item_head.vectors == "own":
                head["outputs"] = vocabulary.item_outputs
        content = {
            "architectures": ["PrefixMemForCausalLM"],
            "auto_map": {
                "AutoConfig": "configuration_prefixmem.PrefixMemConfig",
                "AutoModelForCausalLM": "modeling_prefixmem.PrefixMemForCausalLM",
            },
            "dtype": dtype,
            "item_head": head,
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
        "max_new_tokens": vocabulary.levels,
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


def write_weights(
    folder: Path, parameters: Parameters, dtype: str | None, max_shard_bytes: int
) -> None:
    """Writes safetensors, a tensor or a piece of the memory at a time.

    Args:
      dtype: of all tensors; None keeps each as it was trained.
      max_shard_bytes: of one file; a larger tensor has a file of its own.
    """
    sid_encoder = parameters.model.sid_encoder
    tensors: dict[str, tuple[tuple[int, ...], np.dtype]] = {}
    for weight, name, array, layer in _dense(parameters):
        kept = DTYPES[dtype] if dtype else np.dtype(array.dtype)
        tensors[name] = (weight.hf_shape(array.shape if layer is None else array.shape[1:]), kept)
    if sid_encoder is not None:
        shape = (sid_encoder.rows, sid_encoder.row_width)
        tensors |= dict.fromkeys(
            table_names(sid_encoder), (shape, DTYPES[dtype or sid_encoder.dtype])
        )
    writer = SafetensorsWriter(folder, tensors, max_shard_bytes)
    for weight, name, array, layer in _dense(parameters):
        one = array if layer is None else array[layer]
        writer.tensor(name)[...] = weight.to_hf(np.asarray(one))
    if sid_encoder is not None:
        _write_tables(writer, parameters)


def _dense(parameters: Parameters) -> Iterable[tuple[Weight, str, Any, int | None]]:
    """Every dense weight: its name, our array, and the layer of it (None: all of it)."""
    for weight in weights(parameters.model):
        array: Any = parameters.dense
        for key in weight.path:
            array = array[key]
        if weight.per_layer:
            for layer in range(array.shape[0]):
                yield weight, weight.name.format(layer=layer), array, layer
        else:
            yield weight, weight.name, array, None


def _write_tables(writer: SafetensorsWriter, parameters: Parameters) -> None:
    """Deals the rows of our one array out to the tables, some lines at a time."""
    sid_encoder = parameters.model.sid_encoder
    tables = sid_encoder.tables
    width = sid_encoder.row_width
    pack = parameters.lines[1] // width
    # A multiple of both a line and a row of every table.
    step = max(1, PIECE_BYTES // (tables * width * 4)) * tables
    lines = -(-sid_encoder.rows * tables // pack)
    for first in counted(range(0, lines, step), "memory", "part"):
        last = min(first + step, lines)
        flat = parameters.read_lines(first, last).reshape(-1, width)
        start = first * pack // tables
        count = min(-(-len(flat) // tables), sid_encoder.rows - start)
        for table, name in enumerate(table_names(sid_encoder)):
            rows = flat[table::tables][:count]
            writer.tensor(name)[start : start + len(rows)] = rows
