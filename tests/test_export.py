"""Exported folders open in transformers alone and give our logits and recommendations."""

import dataclasses
import functools
import json
import re
import shutil
import subprocess
import sys
from functools import cached_property, partial
from pathlib import Path

import chex
import jax
import numpy as np
import pytest
import tokenizers
import torch
from conftest import ROOT, command_environment, prefixmem, python_block, python_without_us
from models import SID_ENCODER, make_run, small_config, whole_logits
from oracles import close, save_oracle, torch_logits
from safetensors import safe_open
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LogitsProcessorList,
    PreTrainedTokenizerFast,
)
from transformers.dynamic_module_utils import get_class_from_dynamic_module

from prefixmem_jax.cli import main
from prefixmem_jax.config_groups import (
    DecoderConfig,
    EvaluationConfig,
    InitConfig,
    ItemHeadConfig,
)
from prefixmem_jax.convert import export_run, import_folder
from prefixmem_jax.errors import UserError
from prefixmem_jax.evaluation.heuristics import tuned_transitions
from prefixmem_jax.evaluation.sid_to_text import title_bleu
from prefixmem_jax.files import parse_size
from prefixmem_jax.hf.families import read_folder
from prefixmem_jax.hf.safetensors_files import SafetensorsFolder
from prefixmem_jax.inference.engine import Engine
from prefixmem_jax.model_spec import ModelSpec
from prefixmem_jax.parallel.mesh import make_mesh
from prefixmem_jax.recommender import recommend
from prefixmem_jax.runs.run import TRANSITIONS, Run
from prefixmem_jax.training.initialise import initial_state

FAMILIES = ("qwen3", "llama, llama3 rope, tied", "gemma3", "quickstart")


# Beyond the paper: across the border of items.
ITEM_MEMORY = dataclasses.replace(SID_ENCODER, target_levels=(1, 2, 3, 4), orders=4, items=2)


class Exported:
    """A run and its export: a family's with text, or one from scratch without."""

    def __init__(self, folder: Path, family: str):
        if family == "quickstart":
            config = small_config(DecoderConfig(), 0, sid_encoder=ITEM_MEMORY)
        else:
            save_oracle(folder / "text", family)
            save_tokenizer(folder / "text")
            described = read_folder(folder / "text")
            options = InitConfig(
                from_huggingface=str(folder / "text"), fresh=("sid_encoder", "memory")
            )
            config = small_config(described.decoder, described.text_tokens, init=options)
        # One user at a time: one compiled search serves every number of users.
        config = dataclasses.replace(config, evaluation=EvaluationConfig(batch_size=1))
        self.run = make_run(folder / "run", config)
        self.engine = one_device_engine(self.run)
        self.vocabulary, self.catalog = self.run.vocabulary, self.engine.catalog
        self.item_tokens = self.engine.item_tokens
        self.out = folder / "out"
        export_run(self.run, self.out, max_shard_size="40KB")

    @cached_property
    def model(self):
        return open_in_torch(self.out)

    @cached_property
    def histories(self) -> list[np.ndarray]:
        """Of three users, and of one without any items."""
        examples = self.run.data().split.test.take(np.arange(3))
        return [*(history[-8:] for history in examples.histories()), np.array([], np.int64)]


@pytest.fixture(scope="module")
def export_of(tmp_path_factory):
    """The export of a family, made once."""
    return functools.cache(lambda family: Exported(tmp_path_factory.mktemp("export"), family))


@pytest.fixture(params=FAMILIES)
def exported(request, export_of) -> Exported:
    return export_of(request.param)


@pytest.fixture(scope="module")
def plain_run(tmp_path_factory) -> Run:
    """A run without text; not to be written to."""
    folder = tmp_path_factory.mktemp("plain") / "run"
    return make_run(folder, small_config(DecoderConfig(layers=1), 0))


def save_tokenizer(folder):
    """A byte-level BPE tokenizer of 60 tokens: fewer than the model's 64."""
    inner = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token="?"))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=60, special_tokens=["?", "</s>"])
    inner.train_from_iterator(["the quick brown fox jumps over the lazy dog"] * 3, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="</s>")
    assert 30 < len(tokenizer) < 64
    tokenizer.save_pretrained(folder)


def open_in_torch(folder):
    return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()


def one_device_engine(run: Run) -> Engine:
    return run.engine(devices=jax.devices()[:1])


def our_logits(engine: Engine, sequences) -> np.ndarray:
    params, memory = jax.device_put(
        jax.device_get((engine.params, engine.memory)), jax.devices()[0]
    )
    rows_at = None if memory is None else partial(engine.spec.table.gather, memory)
    return whole_logits(engine.spec.model(params), rows_at, sequences)


def some_items(engine: Engine) -> np.ndarray:
    """Two sequences of five items."""
    return np.stack([engine.item_tokens[i : i + 5].reshape(-1) for i in (0, 50)])


def test_logits_are_ours(exported):
    assert len(list(exported.out.glob("*.safetensors"))) > 2
    vocabulary = exported.vocabulary
    rng = np.random.default_rng(0)
    items = [exported.item_tokens[rng.integers(0, 150, 8)].reshape(-1) for _ in range(3)]
    items.append(rng.integers(0, vocabulary.size, 32))  # anything, most of it no prefix
    tokens = np.stack([np.r_[vocabulary.bos_token, row] for row in items])
    expected = our_logits(exported.engine, tokens)
    close(torch_logits(exported.model, tokens), expected, 1e-4)
    without = torch_logits(exported.model.llm, tokens)
    assert np.abs(without - expected).max() > 0.05 * np.abs(expected).max()


def padded_prompts(exported: Exported) -> tuple[torch.Tensor, torch.Tensor]:
    """Left-padded token ids and attention mask."""
    vocabulary, item_tokens = exported.vocabulary, exported.item_tokens
    rows = [[vocabulary.bos_token, *item_tokens[h].reshape(-1)] for h in exported.histories]
    longest = max(map(len, rows))
    ids = [[vocabulary.pad_token] * (longest - len(r)) + list(map(int, r)) for r in rows]
    mask = [[0] * (longest - len(r)) + [1] * len(r) for r in rows]
    return torch.tensor(ids), torch.tensor(mask)


@pytest.mark.parametrize("exported", ["gemma3", "quickstart"], indirect=True)
def test_beam_search_is_ours_with_and_without_cache(exported):
    for constrained in (True, False):
        codes, scores = exported.engine.search(exported.histories, 6, constrained)
        for cache in (True, False):
            found = generated(
                exported, constrained, cache,
                num_beams=6, num_return_sequences=6, length_penalty=0.0,
            )  # fmt: skip
            np.testing.assert_array_equal(sids_of(exported, found), codes)
            theirs = found.sequences_scores.numpy().reshape(4, 6)
            np.testing.assert_allclose(theirs, scores, atol=1e-4)


def test_greedy_sids_are_ours(export_of):
    exported = export_of("qwen3")
    codes, _ = exported.engine.search(exported.histories, 1, True)
    for cache in (True, False):
        found = generated(exported, True, cache)
        np.testing.assert_array_equal(sids_of(exported, found), codes)


def generated(exported: Exported, constrained: bool, cache: bool, **options):
    """What transformers generates after the histories, all in one batch."""
    out = str(exported.out)
    processor = get_class_from_dynamic_module("sid_catalog.SidLogitsProcessor", out)
    catalog = get_class_from_dynamic_module("sid_catalog.Catalog", out).from_pretrained(
        out, exported.model.config
    )
    limit = processor(catalog.space, catalog if constrained else None)
    assert len({len(h) for h in exported.histories}) > 1  # or nothing is padded
    ids, mask = padded_prompts(exported)
    with torch.no_grad():
        return exported.model.generate(
            ids, attention_mask=mask, max_new_tokens=exported.vocabulary.levels, do_sample=False,
            use_cache=cache, logits_processor=LogitsProcessorList([limit]),
            return_dict_in_generate=True, output_scores=True, **options,
        )  # fmt: skip


def sids_of(exported: Exported, found) -> np.ndarray:
    """Codes [users, beams, levels] at the end of generated sequences."""
    levels = exported.vocabulary.levels
    return exported.vocabulary.decode(found.sequences[:, -levels:].numpy().reshape(4, -1, levels))


@pytest.mark.parametrize("exported", ["gemma3", "quickstart"], indirect=True)
def test_free_generation_from_text_and_sids_is_ours_token_by_token(exported):
    """Greedy, without constraint; each token checked against our logits of the whole sequence."""
    rng = np.random.default_rng(1)
    text = rng.integers(0, max(exported.vocabulary.text_tokens, 2), (3, 6))
    sids = exported.item_tokens[rng.integers(0, 150, (3, 2))].reshape(3, -1)
    prompts = (text, np.concatenate([text, sids], 1), np.concatenate([sids, text, sids], 1))
    written = []
    for prompt in prompts:
        found = []
        for cache in (True, False):
            tokens = torch.tensor(prompt).long()
            with torch.no_grad():
                sequences = exported.model.generate(
                    tokens,
                    attention_mask=torch.ones_like(tokens),
                    max_new_tokens=9,
                    use_cache=cache,
                    do_sample=False,
                )
            found.append(sequences.numpy())
        np.testing.assert_array_equal(found[0], found[1])
        written += [(row, prompt.shape[1]) for row in found[0]]
    logits = our_logits(exported.engine, [row for row, _ in written])
    for ours, (row, start) in zip(logits, written, strict=True):
        np.testing.assert_array_equal(ours[start - 1 : len(row) - 1].argmax(-1), row[start:])


def test_bleu_of_titles(export_of, monkeypatch):
    """Of what is written after SIDs; 100 where those are the titles, in the model's own tokens."""
    assert title_bleu(export_of("quickstart").engine, None) is None
    exported = export_of("qwen3")
    engine, folder = exported.engine, exported.run.text_model
    words = ["the", "quick", "brown", "fox", "jumps", "over", "the", "lazy", "dog"]
    titles = [" ".join(words[i % 5 : i % 5 + 4]) if i % 3 else None for i in range(150)]
    monkeypatch.setattr(engine.catalog, "titles", titles)
    assert 0 <= title_bleu(engine, folder) < 60
    tokenizer = AutoTokenizer.from_pretrained(folder)
    end, sid_token = tokenizer.eos_token_id, exported.vocabulary.token_range(1)[0]

    def perfect(items, new_tokens, end_tokens):
        assert list(end_tokens) == [end]
        rows = np.full((len(items), new_tokens), -1)
        for row, item in zip(rows, items, strict=True):
            written = [*tokenizer(titles[item]).input_ids, sid_token, end]
            row[: len(written)] = written
        return rows

    monkeypatch.setattr(engine, "describe_items", perfect)
    assert title_bleu(engine, folder) == pytest.approx(100)


@pytest.mark.parametrize("family", ["gemma3", "quickstart"])
def test_recommend_from_a_saved_again_folder(family, export_of, tmp_path):
    exported = export_of(family)
    model = exported.model
    (tmp_path / "again").mkdir()
    (tmp_path / "again" / "items.jsonl").write_text("of an older model")
    model.save_pretrained(tmp_path / "again")
    again = open_in_torch(tmp_path / "again")
    expected = model.state_dict()
    assert all(torch.equal(again.state_dict()[k], v) for k, v in expected.items())
    for history in exported.histories:
        ours = recommend(exported.engine, list(history), 6)
        theirs = again.recommend([int(i) for i in history], top=6)
        assert [(r.item, r.sid, r.title) for r in ours] == [
            (r.item, r.sid, r.title) for r in theirs
        ]
        np.testing.assert_allclose([r.score for r in ours], [r.score for r in theirs], atol=1e-4)
    # What the model likes best is not to be had again: as many others are.
    best = [r.item for r in recommend(exported.engine, [0], 30, beam=30)]
    ours = recommend(exported.engine, best, 12, beam=12)
    theirs = again.recommend(torch.tensor(best), top=12, beams=12)
    assert [r.item for r in ours] == [r.item for r in theirs] and len(ours) == 12
    assert not {r.item for r in ours} & set(best)
    with pytest.raises(ValueError, match="item 150 is not in the catalogue of 150"):
        again.recommend([150])
    everything = again.recommend([0], top=400, include_seen=True)  # more beams than SIDs
    assert sorted(r.item for r in everything) == list(range(150))
    first, *others = (tmp_path / "again" / "items.jsonl").read_text().splitlines()
    keyed = json.dumps({**json.loads(first), "key": "one"})
    (tmp_path / "again" / "items.jsonl").write_text("\n".join([keyed, *others]))
    with pytest.raises(ValueError, match="line 2: expected a key on every line, or on none"):
        open_in_torch(tmp_path / "again").recommend([0])


def test_a_cache_without_the_tokens_before_is_refused(export_of):
    model = export_of("quickstart").model
    first = torch.tensor([[3, 4, 5]])
    with torch.no_grad():
        cache = model(first, use_cache=True).past_key_values
        with pytest.raises(ValueError, match="pass prefix_ids"):
            model(first, past_key_values=cache)


@pytest.mark.parametrize("family", ["gemma3", "quickstart"])  # with a text tokenizer, and without
def test_the_documented_generation(family, export_of):
    """docs/huggingface.md, as written but for the folder."""
    exported = export_of(family)
    script = python_block((ROOT / "docs" / "huggingface.md").read_text(), "EXPORTED")
    printed = python_without_us(script.replace("EXPORTED", str(exported.out)))
    found = re.findall(r"<\|sid_(\d)_(\d+)\|>", printed)
    assert [int(level) for level, _ in found] == [1, 2, 3, 4] * 6
    sids = np.array([int(code) for _, code in found]).reshape(2, 3, 4)
    codes, _ = exported.engine.search([np.array([3, 14]), np.array([15])], 10, constrained=True)
    np.testing.assert_array_equal(sids, codes[:, :3])


@pytest.mark.parametrize("family", ["qwen3", "quickstart"])
def test_tokenizer_speaks_sids(family, export_of):
    exported = export_of(family)
    tokenizer = AutoTokenizer.from_pretrained(exported.out, trust_remote_code=True)
    vocabulary = exported.vocabulary
    text = "".join(f"<|sid_{level}_{code}|>" for level, code in enumerate((5, 0, 6, 8), start=1))
    ids = tokenizer("<|sid_bos|>" + text, add_special_tokens=False).input_ids
    assert ids == [vocabulary.bos_token, *vocabulary.encode(np.array([5, 0, 6, 8]))]
    assert tokenizer.decode(ids[1:], skip_special_tokens=True).replace(" ", "") == text
    if vocabulary.text_tokens:
        plain = AutoTokenizer.from_pretrained(exported.run.text_model)("the lazy fox").input_ids
        mixed = tokenizer("the lazy fox" + text).input_ids
        assert mixed == [*plain, *ids[1:]]
        assert tokenizer.convert_ids_to_tokens(63) == "<|unused_63|>"


def bits(array) -> np.ndarray:
    return np.asarray(array).view(np.uint32)


def test_import_back_is_bit_identical(exported, tmp_path):
    """From the exported folder, and from the Orbax checkpoint that `prefixmem import` makes of it."""
    config, engine = exported.run.config, exported.engine
    described = config.sid_encoder
    import_folder(exported.out, tmp_path / "imported")
    mesh = make_mesh(devices=jax.devices()[:1])
    for folder in (exported.out, tmp_path / "imported"):
        options = InitConfig(from_huggingface=str(folder))
        spec = ModelSpec.create(config, exported.vocabulary, mesh)
        state = initial_state(spec, options, seed=7)
        assert len(jax.tree.leaves(state.params)) > 10
        jax.tree.map(
            lambda a, b: np.testing.assert_array_equal(bits(a), bits(b)),
            state.params,
            engine.params,
        )
        rows = described.rows * described.tables
        found, expected = (
            bits(memory).reshape(-1, described.row_width)[:rows]
            for memory in (state.memory, engine.memory)
        )
        np.testing.assert_array_equal(found, expected)
        assert expected.any()
    imported = {path.name for path in (tmp_path / "imported").iterdir()}
    assert "tokenizer.json" in imported and not any(n.endswith("tensors") for n in imported)
    other = dataclasses.replace(config, sid_encoder=dataclasses.replace(described, seed=1))
    spec = ModelSpec.create(other, exported.vocabulary, mesh)
    with pytest.raises(UserError, match=r"its seed is 0, sid_encoder\.seed is 1"):
        initial_state(spec, InitConfig(from_huggingface=str(exported.out)), seed=0)


def test_tables_are_written_in_pieces_and_under_their_own_hash(plain_run, tmp_path, monkeypatch):
    engine, out = one_device_engine(plain_run), tmp_path / "out"
    monkeypatch.setattr("prefixmem_jax.hf.export.PIECE_BYTES", 900)
    export_run(plain_run, out, max_shard_size="10KB")
    tables, described = SafetensorsFolder(out), plain_run.config.sid_encoder
    rows = jax.device_get(engine.memory).reshape(-1, described.row_width)
    count = described.tables
    for table in range(count):
        found = tables.read(f"prefix_memory.tables.{table}.weight")
        np.testing.assert_array_equal(found, rows[table : described.rows * count : count])
    config = json.loads((out / "config.json").read_text())
    config["prefix_memory"]["multipliers"][0][0] += 2
    (out / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="other hash multipliers"):
        initial_state(engine.spec, InitConfig(from_huggingface=str(out)), seed=0)
    del config["prefix_memory"]["multipliers"]
    (out / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="prefix_memory is malformed"):
        read_folder(out)


@pytest.mark.parametrize("address", ["suffix", "full_prefix"])
def test_other_addresses(address, tmp_path):
    sid_encoder = dataclasses.replace(SID_ENCODER, address=address, target_levels=(3, 4))
    run = make_run(tmp_path / "run", small_config(DecoderConfig(), 0, sid_encoder=sid_encoder))
    export_run(run, tmp_path / "out")
    engine = one_device_engine(run)
    tokens = some_items(engine)
    close(torch_logits(open_in_torch(tmp_path / "out"), tokens), our_logits(engine, tokens), 1e-4)


@pytest.mark.parametrize(
    ("sid_encoder", "vectors", "transition_share"),
    [(None, "own", 0.5), (ITEM_MEMORY, "own", 0.0), (ITEM_MEMORY, "memory", 0.3)],
    ids=["alone", "beside memory", "by memory"],
)
def test_an_item_head_and_transitions_go_along(sid_encoder, vectors, transition_share, tmp_path):
    config = small_config(
        DecoderConfig(layers=1),
        0,
        sid_encoder=sid_encoder,
        item_head=ItemHeadConfig(vectors=vectors),
        evaluation=EvaluationConfig(item_share=0.4, transition_share=transition_share),
    )
    run = make_run(tmp_path / "run", config)
    if transition_share:
        transitions = tuned_transitions(run.data(), True)
        # Counts that differ, or equal ones would let rounding decide on the order.
        transitions.near.data *= np.random.default_rng(0).uniform(1, 2, transitions.near.nnz)
        dataclasses.replace(transitions, returns=0.3).save(run.path / TRANSITIONS)
    export_run(run, tmp_path / "out")
    engine, model = one_device_engine(run), open_in_torch(tmp_path / "out")
    if transition_share:
        model.save_pretrained(tmp_path / "again")
        model = open_in_torch(tmp_path / "again")
    for history in run.data().split.test.take(np.arange(3)).histories():
        history = history.tolist()[-8:]
        ours = recommend(engine, history, 10, beam=12)
        theirs = model.recommend(history, 10, beams=12)
        assert [one.item for one in ours] == [one.item for one in theirs]
        np.testing.assert_allclose(
            [one.score for one in ours], [one.score for one in theirs], rtol=1e-4
        )
        again = recommend(engine, history, 10, exclude_seen=False, beam=12)
        theirs = model.recommend(history, 10, beams=12, include_seen=True)
        assert [one.item for one in again] == [one.item for one in theirs]
        np.testing.assert_allclose(
            [one.score for one in again], [one.score for one in theirs], rtol=1e-4
        )
        plain = engine.search([history], 12, constrained=False)  # without the head and the seen
        assert abs(plain[1][0, 0] - ours[0].score) > 1e-3
    import_folder(tmp_path / "out", tmp_path / "imported")
    parts = (
        ["llm"] + ["sid_encoder"] * (sid_encoder is not None) + ["item_head"] * (vectors == "own")
    )
    for source in (tmp_path / "out", tmp_path / "imported"):
        fresh = ("memory",) if sid_encoder is not None else ()
        init = InitConfig(from_huggingface=str(source), fresh=fresh)
        spec = engine.spec
        state = initial_state(spec, init, seed=3)
        chex.assert_trees_all_equal(
            {part: state.params[part] for part in parts}, run.load(spec, parts)
        )


def test_without_sid_encoder_it_is_the_stock_architecture(tmp_path):
    """In a process of its own that may not run code from the folder."""
    run = make_run(tmp_path / "run", small_config(DecoderConfig(), 0, sid_encoder=None))
    export_run(run, tmp_path / "out")
    engine = one_device_engine(run)
    tokens = some_items(engine)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=False)
    assert type(model).__name__ == "Qwen3ForCausalLM"
    close(torch_logits(model, tokens), our_logits(engine, tokens), 1e-4)
    card = (tmp_path / "out" / "README.md").read_text()
    script = python_block(card, "FOLDER").replace("FOLDER", str(tmp_path / "out"))
    printed = python_without_us(script)
    ours = recommend(engine, [0, 1, 2], 5)
    assert [int(line.split()[0]) for line in printed.splitlines()] == [r.item for r in ours]


def test_bfloat16_and_bfloat16_rows(tmp_path):
    sid_encoder = dataclasses.replace(SID_ENCODER, dtype="bfloat16")
    config = small_config(
        DecoderConfig(), 0, sid_encoder=sid_encoder, item_head=ItemHeadConfig("own")
    )
    run = make_run(tmp_path / "run", config)
    export_run(run, tmp_path / "rough", dtype="bfloat16")
    export_run(run, tmp_path / "exact")
    engine = one_device_engine(run)
    tokens = some_items(engine)
    expected = our_logits(engine, tokens)
    rough = open_in_torch(tmp_path / "rough")
    assert rough.dtype == torch.bfloat16
    close(torch_logits(rough, tokens), expected, 0.05)
    items = torch.from_numpy(engine.item_tokens)
    with torch.no_grad():
        scores = rough.item_log_probs(torch.from_numpy(tokens[:1]), items)
    assert len(scores.unique()) == len(items)  # in steps of bfloat16 many would be level
    with safe_open(tmp_path / "exact" / "model.safetensors", framework="pt") as file:
        assert file.get_tensor("prefix_memory.tables.0.weight").dtype == torch.bfloat16
    close(torch_logits(open_in_torch(tmp_path / "exact"), tokens), expected, 1e-4)


def test_the_card_says_what_it_is_and_exporting_needs_no_torch(plain_run, tmp_path):
    run, out = tmp_path / "run", tmp_path / "out"
    shutil.copytree(plain_run.path, run)
    prefixmem("evaluate", run, "--users", "5", "--beam", "6")
    accuracy = json.loads((run / "metrics.json").read_text())["tf_accuracy/level_4"]
    script = (
        "import sys; sys.modules['torch'] = None\n"
        "from prefixmem_jax.cli import main\n"
        f"sys.exit(main(['export', '{run}', '--out', '{out}']))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, env=command_environment()
    )
    assert done.returncode == 0, done.stderr
    card = (out / "README.md").read_text()
    assert plain_run.data_description.sha256 in card and '"rows": 300' in card
    assert f"| tf_accuracy/level_4 | {accuracy:.4f} |" in card
    generation = json.loads((out / "generation_config.json").read_text())
    assert generation["do_sample"] is False and generation["max_new_tokens"] == 4
    assert open_in_torch(out).recommend([0], top=1)


def test_user_errors_are_one_line_and_leave_nothing(plain_run, tmp_path, capfd):
    run, full, new = tmp_path / "run", tmp_path / "full", tmp_path / "new"
    shutil.copytree(plain_run.path, run)
    full.mkdir()
    (full / "thesis.txt").write_text("precious")
    for arguments, words in (
        (("export", run, "--out", full), "holds something else"),
        (("export", tmp_path / "nothing", "--out", new), "not a run directory"),
        (("export", run, "--out", new, "--max-shard-size", "big"), "expected a size such as 4GB"),
        (("export", run, "--out", new, "--tokenizer", tmp_path / "x"), "no tokenizer there"),
        (("import", full, "--out", new), "no config.json"),
        # A run has a config.json too: it must not be taken for an older export.
        (("export", run, "--out", run), "holds something else"),
    ):
        assert main([*map(str, arguments)]) == 2
        said = capfd.readouterr().err
        assert words in said and len(said.strip().splitlines()) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["full", "run"]
    assert (full / "thesis.txt").read_text() == "precious"
    assert (run / "checkpoints" / "0").is_dir()
    for _ in range(2):  # an older export is replaced
        export_run(Run(run), new)
    for out in (run, new):  # neither a run nor a model, its own source, is an older import
        with pytest.raises(UserError, match="holds something else"):
            import_folder(new, out)
    assert (new / "model.safetensors").is_file()
    assert (run / "checkpoints" / "0").is_dir()


def test_text_tokens_need_a_tokenizer(tmp_path):
    run = make_run(tmp_path / "run", small_config(DecoderConfig(layers=1), 64))
    with pytest.raises(UserError, match=r"trained with 64 text tokens.*--tokenizer"):
        export_run(run, tmp_path / "out")
    save_oracle(tmp_path / "text", "qwen3")
    save_tokenizer(tmp_path / "text")
    export_run(run, tmp_path / "out", tokenizer=str(tmp_path / "text"))
    assert (tmp_path / "out" / "tokenizer.json").is_file()


def test_sizes():
    assert [parse_size(text, "--size") for text in ("4GB", "1.5 MB", "2GiB", "10")] == [
        4 * 10**9, 1_500_000, 2**31, 10,
    ]  # fmt: skip
