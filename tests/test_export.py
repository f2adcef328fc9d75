"""Exported folders open in transformers alone and give our logits and recommendations."""

import dataclasses
import json
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
import torch
from conftest import ROOT, command_environment, prefixmem, python_without_us
from safetensors import safe_open
from test_hf import close, save_oracle
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LogitsProcessorList,
    PreTrainedTokenizerFast,
)
from transformers.dynamic_module_utils import get_class_from_dynamic_module

from prefixmem_jax.config import (
    Config,
    DataConfig,
    DecoderConfig,
    InitConfig,
    OptimizerConfig,
    PrefixMemoryConfig,
    SyntheticConfig,
)
from prefixmem_jax.config_files import to_json
from prefixmem_jax.convert import export_run, import_folder
from prefixmem_jax.data.prepare import prepare_data
from prefixmem_jax.errors import UserError
from prefixmem_jax.inference.engine import Recommender
from prefixmem_jax.evaluation.sid_to_text import title_bleu
from prefixmem_jax.files import parse_size
from prefixmem_jax.hf.families import read_folder
from prefixmem_jax.hf.safetensors_files import SafetensorsFolder
from prefixmem_jax.parallel.mesh import make_mesh
from prefixmem_jax.runs.checkpoint import Checkpoints
from prefixmem_jax.training.initialise import initial_state
from prefixmem_jax.training.step import Trainer

ENCODER = PrefixMemoryConfig(target_levels=(2, 3, 4), orders=3, heads=2, rows=300, d_mem=16)
# As a trained model has them: a memory whose vectors change the outputs.
PROJECTION = 20.0


def small_config(model: DecoderConfig, text_tokens: int, **changes) -> Config:
    config = Config(
        "small",
        data=DataConfig(
            text_tokens=text_tokens,
            vocabulary_multiple=8,
            sequence_length=64,
            batch_size=4,
            max_items=8,
            synthetic=SyntheticConfig(
                items=150, users=60, codebook_sizes=(6, 8, 7, 9), children=(6, 4, 4, 3)
            ),
        ),
        model=model,
        encoder=ENCODER,
        optimizer=OptimizerConfig(learning_rate=3e-3),
    )
    return dataclasses.replace(config, **changes)


def make_run(folder, config: Config) -> Recommender:
    """A run directory with a checkpoint of its first state, its encoder made to matter."""
    data = prepare_data(config.data)
    trainer = Trainer.create(config, data.catalog.space, make_mesh(devices=jax.devices()[:1]))
    state = initial_state(trainer, config.init, seed=1)
    if config.encoder is not None:
        encoder = jax.tree.map(lambda x: PROJECTION * x, state.params["encoder"])
        memory = (50 * state.memory).astype(state.memory.dtype)
        state = state._replace(params={**state.params, "encoder": encoder}, memory=memory)
    folder.mkdir()
    (folder / "config.json").write_text(to_json(config))
    with Checkpoints(folder, trainer, keep=1) as checkpoints:
        checkpoints.save(0, state, {})
    return Recommender.load(folder, data, jax.devices()[:1])


def our_logits(recommender: Recommender, tokens: np.ndarray) -> np.ndarray:
    trainer = recommender.trainer
    state = jax.device_put(jax.device_get(recommender.state), jax.devices()[0])
    model = trainer.model(state.params)
    tokens, ones = jnp.asarray(tokens), jnp.ones_like(jnp.asarray(tokens))
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    rows = None
    if model.encoder is not None:
        rows = trainer.table.lookup(state.memory, model.encoder.addresses(tokens, ones))
    return np.asarray(model.next_token_logits(tokens, ones, positions, rows))


def histories(recommender: Recommender) -> list[np.ndarray]:
    """Of three users, and of one without any items."""
    found = [example.history[-8:] for example in recommender.data.split.test[:3]]
    return [*found, np.array([], np.int64)]


def padded_prompts(recommender: Recommender, given: list) -> tuple[torch.Tensor, torch.Tensor]:
    """Left-padded token ids and attention mask."""
    catalog = recommender.data.catalog
    space = catalog.space
    rows = [[space.bos_token, *catalog.tokens[list(h)].reshape(-1)] for h in given]
    longest = max(map(len, rows))
    ids = [[space.bos_token - 1] * (longest - len(r)) + list(map(int, r)) for r in rows]
    mask = [[0] * (longest - len(r)) + [1] * len(r) for r in rows]
    return torch.tensor(ids), torch.tensor(mask)


FAMILIES = {
    "qwen3": None,
    "llama, llama3 rope, tied": None,
    "gemma3": None,
    "quickstart": DecoderConfig(),
}


@pytest.fixture(scope="module", params=FAMILIES)
def exported(request, tmp_path_factory):
    """A run and its export, one per family; one from scratch without text."""
    tmp_path = tmp_path_factory.mktemp("export")
    if request.param == "quickstart":
        config = small_config(FAMILIES[request.param], 0)
    else:
        save_oracle(tmp_path / "text", request.param)
        save_tokenizer(tmp_path / "text")
        described = read_folder(tmp_path / "text")
        init = InitConfig(from_huggingface=str(tmp_path / "text"), fresh=("encoder", "memory"))
        config = small_config(described.decoder, described.text_tokens, init=init)
    recommender = make_run(tmp_path / "run", config)
    export_run(tmp_path / "run", tmp_path / "out", max_shard_size="40KB")
    return recommender, tmp_path / "out", tmp_path / "run"


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


def test_logits_are_ours(exported):
    recommender, out, _ = exported
    assert len(list(out.glob("*.safetensors"))) > 2
    model = open_in_torch(out)
    catalog, space = recommender.data.catalog, recommender.data.catalog.space
    rng = np.random.default_rng(0)
    items = [catalog.tokens[rng.integers(0, len(catalog), 8)].reshape(-1) for _ in range(3)]
    items.append(rng.integers(0, space.vocabulary_size, 32))  # anything, most of it no prefix
    tokens = np.stack([np.r_[space.bos_token, row] for row in items]).astype(np.int64)
    with torch.no_grad():
        found = model(torch.tensor(tokens)).logits.numpy()
        without = model.llm(torch.tensor(tokens)).logits.numpy()
    expected = our_logits(recommender, tokens)
    close(found, expected, 1e-4)
    assert np.abs(without - expected).max() > 0.05 * np.abs(expected).max()


def test_generation_is_ours_with_and_without_cache(exported):
    recommender, out, _ = exported
    model = open_in_torch(out)
    processor = get_class_from_dynamic_module("sid_catalog.SidLogitsProcessor", str(out))
    load = get_class_from_dynamic_module("sid_catalog.Catalog", str(out)).from_pretrained
    catalog, given = load(str(out), model.config), histories(recommender)
    assert len({len(h) for h in given}) > 1  # or nothing is padded
    ids, mask = padded_prompts(recommender, given)
    space = recommender.data.catalog.space
    for constrained in (True, False):
        for beams in (1, 6):
            codes, scores = recommender.search(given, beams, constrained)
            for cache in (True, False):
                limit = processor(catalog.space, catalog if constrained else None)
                options = {"num_beams": beams, "num_return_sequences": beams, "length_penalty": 0.0}
                with torch.no_grad():
                    found = model.generate(
                        ids, attention_mask=mask, max_new_tokens=space.levels, do_sample=False,
                        use_cache=cache, logits_processor=LogitsProcessorList([limit]),
                        return_dict_in_generate=True, output_scores=True,
                        **(options if beams > 1 else {}),
                    )  # fmt: skip
                new = found.sequences[:, ids.shape[1] :].numpy().reshape(4, beams, space.levels)
                np.testing.assert_array_equal(space.decode(new), codes)
                if beams > 1:
                    theirs = found.sequences_scores.numpy().reshape(4, beams)
                    np.testing.assert_allclose(theirs, scores, atol=1e-4)


def test_free_generation_from_text_and_sids_is_ours_token_by_token(exported):
    """Greedy, without constraint; each token checked against our logits of the whole sequence."""
    recommender, out, _ = exported
    model, space = open_in_torch(out), recommender.data.catalog.space
    rng = np.random.default_rng(1)
    text = rng.integers(0, max(space.text_tokens, 2), (3, 6))
    sids = recommender.data.catalog.tokens[rng.integers(0, 150, (3, 2))].reshape(3, -1)
    for prompt in (text, np.concatenate([text, sids], 1), np.concatenate([sids, text, sids], 1)):
        found = []
        for cache in (True, False):
            tokens = torch.tensor(prompt).long()
            with torch.no_grad():
                sequences = model.generate(
                    tokens,
                    attention_mask=torch.ones_like(tokens),
                    max_new_tokens=9,
                    use_cache=cache,
                    do_sample=False,
                )
            found.append(sequences.numpy())
        np.testing.assert_array_equal(found[0], found[1])
        logits = our_logits(recommender, found[0])[:, prompt.shape[1] - 1 : -1]
        np.testing.assert_array_equal(logits.argmax(-1), found[0][:, prompt.shape[1] :])


def test_bleu_of_titles(exported, monkeypatch):
    """Of what is written after SIDs; 100 where those are the titles, in the model's own tokens."""
    recommender, _, _ = exported
    folder = recommender.config.init.from_huggingface
    if folder is None:
        assert title_bleu(recommender) is None
        return
    catalog = recommender.data.catalog
    words = ["the", "quick", "brown", "fox", "jumps", "over", "the", "lazy", "dog"]
    titles = [" ".join(words[i % 5 : i % 5 + 4]) if i % 3 else None for i in range(len(catalog))]
    monkeypatch.setattr(catalog, "titles", titles)
    assert 0 <= title_bleu(recommender) < 60
    tokenizer = AutoTokenizer.from_pretrained(folder)
    end, sid_token = tokenizer.eos_token_id, catalog.space.token_offset

    def perfect(items, new_tokens, end_tokens):
        assert list(end_tokens) == [end]
        rows = np.full((len(items), new_tokens), -1)
        for row, item in zip(rows, items, strict=True):
            written = [*tokenizer(titles[item]).input_ids, sid_token, end]
            row[: len(written)] = written
        return rows

    monkeypatch.setattr(recommender, "describe_items", perfect)
    assert title_bleu(recommender) == pytest.approx(100)


def test_recommend_from_a_saved_again_folder(exported, tmp_path):
    recommender, out, _ = exported
    model = open_in_torch(out)
    model.save_pretrained(tmp_path / "again")
    again = open_in_torch(tmp_path / "again")
    expected = model.state_dict()
    assert all(torch.equal(again.state_dict()[k], v) for k, v in expected.items())
    for history in histories(recommender):
        ours = recommender.recommend(list(history), 7)
        theirs = again.recommend([int(i) for i in history], top=7)
        assert [(r.item, r.sid, r.title) for r in ours] == [
            (r.item, r.sid, r.title) for r in theirs
        ]
        np.testing.assert_allclose([r.score for r in ours], [r.score for r in theirs], atol=1e-4)
    with pytest.raises(ValueError, match="item 150 is not in the catalogue of 150"):
        again.recommend([150])
    everything = again.recommend([0], top=400)  # more beams than SIDs
    assert sorted(r.item for r in everything) == list(range(150))


def test_a_cache_without_the_tokens_before_is_refused(exported):
    _, out, _ = exported
    model = open_in_torch(out)
    first = torch.tensor([[3, 4, 5]])
    with torch.no_grad():
        cache = model(first, use_cache=True).past_key_values
        with pytest.raises(ValueError, match="pass prefix_ids"):
            model(first, past_key_values=cache)


def test_the_documented_generation(exported):
    """docs/huggingface.md, as written but for the folder."""
    recommender, out, _ = exported
    script = (ROOT / "docs" / "huggingface.md").read_text().split("```python\n")[2].split("```")[0]
    printed = python_without_us(script.replace("EXPORTED", str(out)))
    found = re.findall(r"<\|sid_(\d)_(\d+)\|>", printed)
    assert [int(level) for level, _ in found] == [1, 2, 3, 4] * 6
    sids = np.array([int(code) for _, code in found]).reshape(2, 3, 4)
    codes, _ = recommender.search([np.array([3, 14]), np.array([15])], 10, constrained=True)
    np.testing.assert_array_equal(sids, codes[:, :3])


def test_tokenizer_speaks_sids(exported):
    recommender, out, _ = exported
    tokenizer = AutoTokenizer.from_pretrained(out, trust_remote_code=True)
    space = recommender.data.catalog.space
    text = "".join(f"<|sid_{level}_{code}|>" for level, code in enumerate((5, 0, 6, 8), start=1))
    ids = tokenizer("<|sid_bos|>" + text, add_special_tokens=False).input_ids
    assert ids == [space.bos_token, *space.encode(np.array([5, 0, 6, 8]))]
    assert tokenizer.decode(ids[1:], skip_special_tokens=True).replace(" ", "") == text
    if space.text_tokens:
        plain = AutoTokenizer.from_pretrained(
            recommender.config.init.from_huggingface
        )("the lazy fox").input_ids  # fmt: skip
        mixed = tokenizer("the lazy fox" + text).input_ids
        assert mixed == [*plain, *ids[1:]]
        assert tokenizer.convert_ids_to_tokens(63) == "<|unused_63|>"


def test_import_back_is_bit_identical(exported, tmp_path):
    """From the exported folder, and from the Orbax checkpoint that `prefixmem import` makes of it."""
    recommender, out, _ = exported
    import_folder(out, tmp_path / "imported")
    for folder in (out, tmp_path / "imported"):
        config = dataclasses.replace(
            recommender.config, init=InitConfig(from_huggingface=str(folder))
        )
        trainer = Trainer.create(
            config, recommender.data.catalog.space, make_mesh(devices=jax.devices()[:1])
        )
        state = initial_state(trainer, config.init, seed=7)
        same = jax.tree.map(
            lambda a, b: np.array_equal(a.view(np.uint32), b.view(np.uint32)),
            jax.device_get(state.params),
            jax.device_get(recommender.state.params),
        )
        assert all(jax.tree.leaves(same)) and len(jax.tree.leaves(same)) > 10
        width = ENCODER.d_mem // ENCODER.heads
        rows = ENCODER.rows * ENCODER.orders * ENCODER.heads
        found, expected = (
            jax.device_get(x).reshape(-1, width)[:rows]
            for x in (state.memory, recommender.state.memory)
        )
        assert np.array_equal(found.view(np.uint32), expected.view(np.uint32))
        assert expected.any()
    imported = {path.name for path in (tmp_path / "imported").iterdir()}
    assert "tokenizer.json" in imported and not any(n.endswith("tensors") for n in imported)
    other = dataclasses.replace(config, encoder=dataclasses.replace(ENCODER, seed=1))
    trainer = Trainer.create(
        other, recommender.data.catalog.space, make_mesh(devices=jax.devices()[:1])
    )
    with pytest.raises(UserError, match=r"its seed is 0, encoder\.seed is 1"):
        initial_state(trainer, InitConfig(from_huggingface=str(out)), seed=0)


def test_tables_are_written_in_pieces_and_under_their_own_hash(tmp_path, monkeypatch):
    recommender = make_run(tmp_path / "run", small_config(DecoderConfig(layers=1), 0))
    monkeypatch.setattr("prefixmem_jax.hf.export.PIECE_BYTES", 900)
    export_run(tmp_path / "run", tmp_path / "out", max_shard_size="10KB")
    tables = SafetensorsFolder(tmp_path / "out")
    width, count = ENCODER.d_mem // ENCODER.heads, ENCODER.orders * ENCODER.heads
    rows = jax.device_get(recommender.state.memory).reshape(-1, width)
    for table in range(count):
        found = tables.read(f"prefix_memory.tables.{table}.weight")
        np.testing.assert_array_equal(found, rows[table : ENCODER.rows * count : count])
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    config["prefix_memory"]["multipliers"][0][0] += 2
    (tmp_path / "out" / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="other hash multipliers"):
        initial_state(
            recommender.trainer, InitConfig(from_huggingface=str(tmp_path / "out")), seed=0
        )
    del config["prefix_memory"]["multipliers"]
    (tmp_path / "out" / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="prefix_memory is malformed"):
        read_folder(tmp_path / "out")


@pytest.mark.parametrize("address", ["suffix", "full_prefix"])
def test_other_addresses(address, tmp_path):
    encoder = dataclasses.replace(ENCODER, address=address, target_levels=(3, 4))
    recommender = make_run(tmp_path / "run", small_config(DecoderConfig(), 0, encoder=encoder))
    export_run(tmp_path / "run", tmp_path / "out")
    tokens = np.stack([recommender.data.catalog.tokens[i : i + 5].reshape(-1) for i in (0, 50)])
    with torch.no_grad():
        found = open_in_torch(tmp_path / "out")(torch.tensor(tokens).long()).logits.numpy()
    close(found, our_logits(recommender, tokens), 1e-4)


def test_without_encoder_it_is_the_stock_architecture(tmp_path):
    """In a process of its own that may not run code from the folder."""
    recommender = make_run(tmp_path / "run", small_config(DecoderConfig(), 0, encoder=None))
    export_run(tmp_path / "run", tmp_path / "out")
    tokens = np.stack([recommender.data.catalog.tokens[i : i + 5].reshape(-1) for i in (0, 50)])
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=False)
    assert type(model).__name__ == "Qwen3ForCausalLM"
    with torch.no_grad():
        found = model(torch.tensor(tokens).long()).logits.numpy()
    close(found, our_logits(recommender, tokens), 1e-4)
    card = (tmp_path / "out" / "README.md").read_text()
    script = card.split("```python\n")[1].split("```")[0].replace("FOLDER", str(tmp_path / "out"))
    printed = python_without_us(script)
    ours = recommender.recommend([0, 1, 2], 5)
    assert [int(line.split()[0]) for line in printed.splitlines()] == [r.item for r in ours]


def test_exporting_needs_no_torch(tmp_path):
    make_run(tmp_path / "run", small_config(DecoderConfig(layers=1), 0))
    script = (
        "import sys; sys.modules['torch'] = None\n"
        "from prefixmem_jax.cli import main\n"
        f"sys.exit(main(['export', '{tmp_path / 'run'}', '--out', '{tmp_path / 'out'}']))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, env=command_environment()
    )
    assert done.returncode == 0, done.stderr
    assert open_in_torch(tmp_path / "out").recommend([0], top=1)


def test_bfloat16_and_bfloat16_rows(tmp_path):
    encoder = dataclasses.replace(ENCODER, dtype="bfloat16")
    recommender = make_run(tmp_path / "run", small_config(DecoderConfig(), 0, encoder=encoder))
    export_run(tmp_path / "run", tmp_path / "rough", dtype="bfloat16")
    export_run(tmp_path / "run", tmp_path / "exact")
    tokens = np.stack([recommender.data.catalog.tokens[i : i + 5].reshape(-1) for i in (0, 50)])
    expected = our_logits(recommender, tokens)
    with torch.no_grad():
        rough = open_in_torch(tmp_path / "rough")
        assert rough.dtype == torch.bfloat16
        found = rough(torch.tensor(tokens).long()).logits.float().numpy()
        close(found, expected, 0.05)
        with safe_open(tmp_path / "exact" / "model.safetensors", framework="pt") as file:
            assert file.get_tensor("prefix_memory.tables.0.weight").dtype == torch.bfloat16
        close(
            open_in_torch(tmp_path / "exact")(torch.tensor(tokens).long()).logits.numpy(),
            expected,
            1e-4,
        )


def test_the_card_says_what_it_is(tmp_path):
    config = small_config(DecoderConfig(layers=1), 0)
    make_run(tmp_path / "run", config)
    digest = prepare_data(config.data).dataset.sha256
    prefixmem("evaluate", tmp_path / "run", "--users", "5", "--beam", "6")
    recall = json.loads((tmp_path / "run" / "metrics.json").read_text())["tf_accuracy/level_4"]
    prefixmem("export", tmp_path / "run", "--out", tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    assert digest in card and '"rows": 300' in card
    assert f"| tf_accuracy/level_4 | {recall:.4f} |" in card
    generation = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert generation["do_sample"] is False and generation["max_new_tokens"] == 4


def test_user_errors_are_one_line_and_leave_nothing(tmp_path):
    make_run(tmp_path / "run", small_config(DecoderConfig(layers=1), 0))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("precious")
    for arguments, words in (
        (("export", tmp_path / "run", "--out", tmp_path / "full"), "holds something else"),
        (("export", tmp_path / "nothing", "--out", tmp_path / "new"), "not a run directory"),
        (
            ("export", tmp_path / "run", "--out", tmp_path / "new", "--max-shard-size", "big"),
            "expected a size such as 4GB",
        ),
        (
            ("export", tmp_path / "run", "--out", tmp_path / "new", "--tokenizer", tmp_path / "x"),
            "no config.json",
        ),
        (("import", tmp_path / "full", "--out", tmp_path / "new"), "no config.json"),
        # A run has a config.json too: it must not be taken for an older export.
        (("export", tmp_path / "run", "--out", tmp_path / "run"), "holds something else"),
    ):
        failed = prefixmem(*arguments, expect=2)
        assert words in failed.stderr and len(failed.stderr.strip().splitlines()) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["full", "run"]
    assert (tmp_path / "full" / "thesis.txt").read_text() == "precious"
    assert (tmp_path / "run" / "checkpoints" / "0").is_dir()
    for _ in range(2):  # an older export is replaced
        prefixmem("export", tmp_path / "run", "--out", tmp_path / "new")
    for out in ("run", "new"):  # neither a run nor a model, its own source, is an older import
        with pytest.raises(UserError, match="holds something else"):
            import_folder(tmp_path / "new", tmp_path / out)
    assert (tmp_path / "new" / "model.safetensors").is_file()
    assert (tmp_path / "run" / "checkpoints" / "0").is_dir()


def test_text_tokens_need_a_tokenizer(tmp_path):
    make_run(tmp_path / "run", small_config(DecoderConfig(layers=1), 64))
    with pytest.raises(UserError, match=r"trained with 64 text tokens.*--tokenizer"):
        export_run(tmp_path / "run", tmp_path / "out")
    save_oracle(tmp_path / "text", "qwen3")
    save_tokenizer(tmp_path / "text")
    export_run(tmp_path / "run", tmp_path / "out", tokenizer=str(tmp_path / "text"))
    assert (tmp_path / "out" / "tokenizer.json").is_file()


def test_sizes():
    assert [parse_size(text, "--size") for text in ("4GB", "1.5 MB", "2GiB", "10")] == [
        4 * 10**9, 1_500_000, 2**31, 10,
    ]  # fmt: skip
