"""Between our checkpoints and Hugging Face folders: `prefixmem export` and `prefixmem import`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

from prefixmem_jax.config import Config
from prefixmem_jax.config_files import to_json
from prefixmem_jax.data.transitions import needed
from prefixmem_jax.errors import UserError
from prefixmem_jax.files import parse_size, read_json_object, replacing_files
from prefixmem_jax.hf.export import Parameters, copy_all_but_weights, write_folder
from prefixmem_jax.hf.families import ModelFolder, read_folder
from prefixmem_jax.hf.load import load_parts, load_rows
from prefixmem_jax.hf.mapping import Architecture
from prefixmem_jax.hf.safetensors_files import SafetensorsFolder
from prefixmem_jax.kinds import kind_name
from prefixmem_jax.model_spec import ModelSpec
from prefixmem_jax.models.decoder import Decoder
from prefixmem_jax.parallel.mesh import all_agree, make_mesh
from prefixmem_jax.parallel.parameters import abstract_parameters
from prefixmem_jax.runs.checkpoint import Checkpoints, memory_part
from prefixmem_jax.runs.run import TRANSITIONS, Run
from prefixmem_jax.semantic_ids.catalog import Catalog
from prefixmem_jax.semantic_ids.space import SidSpace
from prefixmem_jax.semantic_ids.vocabulary import Vocabulary
from prefixmem_jax.sid_encoders.prefix_memory import PrefixMemoryConfig


def export_run(
    run: Run,
    out: Path,
    dtype: str | None = None,
    max_shard_size: str = "4GB",
    tokenizer: str | None = None,
    catalog: Catalog | None = None,
) -> None:
    """Writes a run (its checkpoint of `run.step`) as a Hugging Face folder.

    Dense parameters are held in memory whole, the memory's rows some megabytes at a time. With
    several processes all of them call alike: the first writes, and the others wait.

    Args:
      out: an older export there is replaced, but for files that were changed since.
      dtype: `float32` or `bfloat16` for all weights; None keeps each as it was trained.
      max_shard_size: such as `4GB`; a larger tensor has a file of its own.
      tokenizer: folder of the text tokenizer; None means `data.tokenizer`, or that of the folder in
        `init` that the run, or the run it took `llm` from, started from.
      catalog: the run's, where the caller has it; None means that of its data.

    Raises:
      UserError: not a run that generates, an `out` that holds something else, no tokenizer for the
        text tokens, or a decoder that no Hugging Face architecture computes.
    """
    if jax.process_index() == 0:
        _export_run(run, out, dtype, max_shard_size, tokenizer, catalog)
    all_agree(True)


def _export_run(
    run: Run,
    out: Path,
    dtype: str | None,
    max_shard_size: str,
    tokenizer: str | None,
    catalog: Catalog | None,
) -> None:
    run.check_generates()
    if not run.config.objective.exports:
        kind = kind_name(type(run.config.objective))
        raise UserError(f"{run.path}: a {kind} run has no decoder that Hugging Face knows")
    config, shard_bytes = run.config, parse_size(max_shard_size, "--max-shard-size")
    text_model = tokenizer or run.text_model
    if config.data.text_tokens and text_model is None:
        raise UserError(
            f"{run.path}: trained with {config.data.text_tokens} text tokens, from no Hugging Face "
            "folder and without data.tokenizer; name their tokenizer with --tokenizer"
        )
    encoder = run.config.sid_encoder
    if type(encoder) not in (PrefixMemoryConfig, type(None)):  # what builds on it is another
        raise UserError(
            f"{run.path}: its SID encoder is {kind_name(type(encoder))}; exported models have "
            "prefix_memory, or none"
        )
    catalog = run.catalog() if catalog is None else run.checked(catalog)
    with replacing_files(out, "export", last="config.json") as staged:
        write_folder(
            staged,
            _parameters(run),
            catalog,
            run.vocabulary,
            text_model,
            config,
            model_card(run),
            dtype,
            shard_bytes,
        )
        if config.evaluation.transition_share > 0:
            needed(run.transitions).save(staged / TRANSITIONS)


def _parameters(run: Run) -> Parameters:
    """A run's dense parameters, loaded, and its memory's rows, to be read."""
    spec = run.spec(jax.devices()[:1])
    params = run.load(spec, spec.params)
    lines = read_lines = None
    if spec.table is not None:
        with run.checkpoints() as checkpoints:
            stored = checkpoints.open_rows(spec, run.step)
        lines = spec.table.shape

        def read_lines(first: int, last: int) -> np.ndarray:
            return stored[first:last].read().result()

    model = Architecture(run.config.model, run.config.sid_encoder, run.config.item_head)
    return Parameters(model, params, lines, read_lines)


def model_card(run: Run) -> str:
    """README.md of an exported folder: what it is, how to use it, how it was made and evaluated."""
    config, data, step = run.config, run.data_description, run.step
    space, sid_encoder = run.vocabulary.space, config.sid_encoder
    tags = ["semantic-ids", "generative-recommendation"] + (["prefixmem"] if sid_encoder else [])
    lines = [
        "---",
        "library_name: transformers",
        "pipeline_tag: text-generation",
        f"tags: [{', '.join(tags)}]",
        "---",
        f"# {' '.join(config.name.split())}",
        "",
        f"Recommends items by generating Semantic IDs of {space.levels} levels "
        f"{space.codebook_sizes}; trained with prefixmem_jax for {step} steps"
        + (", with a PrefixMem encoder (arXiv 2606.00324)." if sid_encoder else "."),
        "",
        "```python",
        "from transformers import AutoModelForCausalLM",
        "",
    ]
    if sid_encoder or config.item_head:
        lines += [
            'model = AutoModelForCausalLM.from_pretrained("FOLDER", trust_remote_code=True)',
            "for best in model.recommend([0, 1, 2], top=5):",
            "    print(best.item, best.score, best.title)",
        ]
    else:
        lines += [
            "from transformers.dynamic_module_utils import get_class_from_dynamic_module",
            "",
            'model = AutoModelForCausalLM.from_pretrained("FOLDER")',
            'Catalog = get_class_from_dynamic_module("sid_catalog.Catalog", "FOLDER")',
            'catalog = Catalog.from_pretrained("FOLDER", model.config)',
            "for best in catalog.recommend(model, [0, 1, 2], top=5):",
            "    print(best.item, best.score, best.title)",
        ]
    lines += ["```", "", "## Data", ""]
    lines += [
        f"{data.name}: {data.items:,} items, {data.users:,} users; sha256 {data.sha256}.",
        "",
        "## Metrics",
        "",
    ]
    lines += [
        *_metrics(run),
        "",
        "## Config",
        "",
        "```json",
        to_json(config).strip(),
        "```",
    ]
    return "\n".join(lines) + "\n"


def _metrics(run: Run) -> list[str]:
    path = run.path / "metrics.json"
    if not path.is_file():
        return ["Not evaluated."]
    metrics = read_json_object(path)
    if metrics.get("step") != run.step:
        return [f"Not evaluated at step {run.step}."]
    if metrics.get("learnt_sha256") not in (None, run.learnt_sha256):
        return ["Not evaluated since it was trained anew."]
    try:
        split = metrics["split"]
        users = (
            f"{metrics['retrieval_users']:,} of {metrics[f'{split}_users']:,} {split} users, "
            f"beam {metrics['beam']}."
        )
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path}: not what an evaluation wrote ({error}); evaluate again") from None
    values = {k: v for k, v in metrics.items() if isinstance(v, float)}
    return [users, "", "| metric | value |", "|---|---|"] + [
        f"| {name} | {value:.4f} |" for name, value in values.items()
    ]


def import_folder(folder: Path, out: Path) -> None:
    """Turns a Hugging Face folder's weights into an Orbax checkpoint.

    `out` gets the folder's other files and `checkpoints/0`; `init.from_huggingface` takes either.
    """
    described = read_folder(folder)
    files = SafetensorsFolder(folder)
    with replacing_files(out, "import", last="config.json") as staged:
        copy_all_but_weights(folder, staged)
        parts = _imported_parts(described, files)
        try:
            with Checkpoints(staged, keep=1) as checkpoints:
                checkpoints.save(0, parts, {})
        except ValueError as error:  # a full disk, as TensorStore tells of it
            raise OSError(" ".join(str(error).split())) from None


def _imported_parts(described: ModelFolder, files: SafetensorsFolder) -> dict[str, Any]:
    """The folder's parts on one device, the vocabulary exactly as it is there."""
    mesh = make_mesh(devices=jax.devices()[:1])
    model = described.model
    if model.is_stock:
        decoder = nnx.eval_shape(
            lambda: Decoder(model.decoder, described.vocabulary, rngs=nnx.Rngs(0))
        )
        abstract = {"llm": abstract_parameters(decoder, mesh)}
        return load_parts(files, model, abstract)
    space = SidSpace(described.codebook_sizes)
    # Filled up to the size that it has there.
    vocabulary = Vocabulary(space, described.text_tokens, described.vocabulary, described.items)
    config = Config(
        "import",
        model=model.decoder,
        sid_encoder=model.sid_encoder,
        item_head=model.item_head,
    )
    spec = ModelSpec.create(config, vocabulary, mesh)
    abstract = dict(spec.params)
    if "item_head" in abstract:
        (vectors,) = abstract["item_head"].values()
        shape = (vectors.shape[0], described.item_outputs)
        abstract["item_head"] = {
            "vectors": jax.ShapeDtypeStruct(shape, vectors.dtype, sharding=vectors.sharding)
        }
    parts = load_parts(files, model, abstract)
    if spec.table is not None:
        parts["memory"] = memory_part(spec, load_rows(files, model.sid_encoder, spec.memory))
    return parts
