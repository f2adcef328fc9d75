"""Between our checkpoints and Hugging Face folders: `prefixmem export` and `prefixmem import`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np

from prefixmem_jax.config import Config
from prefixmem_jax.config_files import load_config, to_json
from prefixmem_jax.data.prepare import PreparedData, prepare_data
from prefixmem_jax.errors import UserError
from prefixmem_jax.files import parse_size, replacing_folder
from prefixmem_jax.hf.export import Parameters, copy_all_but_weights, write_folder
from prefixmem_jax.hf.families import read_folder
from prefixmem_jax.hf.load import load_parts, load_rows
from prefixmem_jax.hf.safetensors_files import SafetensorsFolder
from prefixmem_jax.parallel.mesh import make_mesh
from prefixmem_jax.semantic_ids.space import SPECIAL_TOKENS, SidSpace
from prefixmem_jax.runs.checkpoint import FOLDER, Checkpoints
from prefixmem_jax.training.initialise import text_model_of
from prefixmem_jax.training.step import Trainer


def export_run(
    run: Path,
    out: Path,
    dtype: str | None = None,
    max_shard_size: str = "4GB",
    tokenizer: str | None = None,
    data: PreparedData | None = None,
) -> None:
    """Writes a run's newest checkpoint as a Hugging Face folder.

    Dense parameters are held in memory whole, the memory's rows some megabytes at a time.

    Args:
      out: replaced if it holds an older export.
      dtype: `float32` or `bfloat16` for all weights; None keeps each as it was trained.
      max_shard_size: such as `4GB`; a larger tensor has a file of its own.
      tokenizer: folder of the text tokenizer; None means that of the folder in `init` that the run,
        or the run it took `llm` from, started from.
      data: the run's data, where the caller has it already.

    Raises:
      UserError: not a run that generates, an `out` that holds something else, no tokenizer for the
        text tokens, or a decoder that no Hugging Face architecture computes.
    """
    if not (run / "config.json").is_file():
        raise UserError(f"{run}: not a run directory (it has no config.json)")
    config = load_config(run / "config.json")
    if config.objective != "next_token":
        raise UserError(f"{run}: a {config.objective} run has no decoder; name a next_token run")
    shard_bytes = parse_size(max_shard_size, "--max-shard-size")
    data = data or prepare_data(config.data)
    text_model = tokenizer or text_model_of(config)
    if config.data.text_tokens and text_model is None:
        raise UserError(
            f"{run}: trained with {config.data.text_tokens} text tokens, from no Hugging Face "
            "folder; name their tokenizer with --tokenizer"
        )
    trainer = Trainer.create(config, data.catalog.space, make_mesh(devices=jax.devices()[:1]))
    with Checkpoints(run, trainer) as checkpoints:
        abstract = trainer.abstract_state()
        params = checkpoints.load(dict(abstract.params))
        read_lines = None
        if abstract.memory is not None:
            stored = checkpoints.open_rows()

            def read_lines(first: int, last: int) -> np.ndarray:
                return stored[first:last].read().result()

        lines = None if abstract.memory is None else abstract.memory.shape
        parameters = Parameters(config.model, config.encoder, params, lines, read_lines)
        card = model_card(run, config, checkpoints.latest_step, data)
        with replacing_folder(out, _is_export) as beside:
            write_folder(
                beside,
                parameters,
                data.catalog,
                text_model,
                config.data.sequence_length,
                card,
                dtype,
                shard_bytes,
            )


def _is_export(folder: Path) -> bool:
    """Whether `export_run` wrote this folder; runs and other models have a config.json too."""
    return "semantic_ids" in _config_keys(folder)


def _is_import(folder: Path) -> bool:
    """Whether `import_folder` wrote this folder."""
    return "model_type" in _config_keys(folder) and (folder / FOLDER).is_dir()


def _config_keys(folder: Path) -> set[str]:
    try:
        return set(json.loads((folder / "config.json").read_text()))
    except (OSError, ValueError, TypeError):
        return set()


def model_card(run: Path, config: Config, step: int, data: PreparedData) -> str:
    """README.md of an exported folder: what it is, how to use it, how it was made and evaluated."""
    space, encoder = data.catalog.space, config.encoder
    tags = ["semantic-ids", "generative-recommendation"] + (["prefixmem"] if encoder else [])
    lines = [
        "---",
        "library_name: transformers",
        "pipeline_tag: text-generation",
        f"tags: [{', '.join(tags)}]",
        "---",
        f"# {config.name}",
        "",
        f"Recommends items by generating Semantic IDs of {space.levels} levels "
        f"{space.codebook_sizes}; trained with prefixmem_jax for {step} steps"
        + (", with a PrefixMem encoder (arXiv 2606.00324)." if encoder else "."),
        "",
        "```python",
        "from transformers import AutoModelForCausalLM",
        "",
    ]
    if encoder:
        lines += [
            'model = AutoModelForCausalLM.from_pretrained("FOLDER", trust_remote_code=True)',
            "for found in model.recommend([0, 1, 2], top=5):",
            "    print(found.item, found.score, found.title)",
        ]
    else:
        lines += [
            "from transformers.dynamic_module_utils import get_class_from_dynamic_module",
            "",
            'model = AutoModelForCausalLM.from_pretrained("FOLDER")',
            'Catalog = get_class_from_dynamic_module("sid_catalog.Catalog", "FOLDER")',
            'catalog = Catalog.from_pretrained("FOLDER", model.config)',
            "for found in catalog.recommend(model, [0, 1, 2], top=5):",
            "    print(found.item, found.score, found.title)",
        ]
    lines += ["```", "", "## Data", ""]
    lines += [
        f"{data.dataset.name}: {len(data.catalog):,} items, {len(data.catalog.group_sids):,} "
        f"distinct SIDs, {len(data.dataset.histories):,} users; sha256 {data.dataset.sha256}.",
        "",
        "## Metrics",
        "",
    ]
    lines += [*_metrics(run, step), "", "## Config", "", "```json", to_json(config).strip(), "```"]
    return "\n".join(lines) + "\n"


def _metrics(run: Path, step: int) -> list[str]:
    path = run / "metrics.json"
    if not path.is_file():
        return ["Not evaluated."]
    found = json.loads(path.read_text())
    if found.get("step") != step:
        return [f"Not evaluated at step {step}."]
    evaluated = (
        f"{found['retrieval_users']:,} of {found['test_users']:,} test users, beam {found['beam']}."
    )
    values = {k: v for k, v in found.items() if isinstance(v, float)}
    return [evaluated, "", "| metric | value |", "|---|---|"] + [
        f"| {name} | {value:.4f} |" for name, value in values.items()
    ]


def import_folder(folder: Path, out: Path) -> None:
    """Turns a Hugging Face folder's weights into an Orbax checkpoint.

    `out` gets the folder's other files and `checkpoints/0`; `init.from_huggingface` takes either.
    """
    described = read_folder(folder)
    files = SafetensorsFolder(folder)
    mesh = make_mesh(devices=jax.devices()[:1])
    # The vocabulary exactly as it is there, with or without SID tokens.
    space = SidSpace((), vocabulary_multiple=described.vocabulary)
    if described.codebook_sizes is not None:
        offset = described.text_tokens + SPECIAL_TOKENS
        space = SidSpace(described.codebook_sizes, offset, described.vocabulary)
    config = Config("import", model=described.decoder, encoder=described.encoder)
    trainer = Trainer.create(config, space, mesh)
    abstract = trainer.abstract_state()
    parts: dict[str, Any] = load_parts(
        files, described.decoder, described.encoder, dict(abstract.params)
    )
    with replacing_folder(out, _is_import) as beside:
        copy_all_but_weights(folder, beside)
        with Checkpoints(beside, trainer, keep=1) as checkpoints:
            if described.encoder is not None:
                rows = load_rows(files, described.encoder, abstract.memory)
                parts["memory"] = checkpoints.memory_part(rows)
            checkpoints.save_parts(0, parts, {})
