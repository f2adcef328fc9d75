"""The encoder-decoder against transformers' T5, what it may see, and TIGER from run to list."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from conftest import prefixmem
from ended_runs import state_of
from flax import nnx
from models import DECODER, make_encoder_decoder, make_model
from transformers import T5Config, T5ForConditionalGeneration
from transformers.models.t5.modeling_t5 import T5Attention

from prefixmem_jax.data.batch import Batch
from prefixmem_jax.data.documents.document import Documents, offsets_of
from prefixmem_jax.data.documents.items import ask_for_last_item
from prefixmem_jax.data.packing import one_per_row, pack
from prefixmem_jax.evaluation.evaluator import load_scores
from prefixmem_jax.inference.cached_sid_lm import rows_for
from prefixmem_jax.layers.relative_attention import BUCKETS, FAR, bucket
from prefixmem_jax.runs.metrics import read_metrics

SIZES = (5, 4, 6)


@pytest.mark.parametrize("both_ways", [True, False])
def test_distances_have_t5s_buckets(both_ways):
    ahead = np.arange(-300, 301)
    expected = T5Attention._relative_position_bucket(
        torch.tensor(ahead), both_ways, num_buckets=BUCKETS, max_distance=FAR
    )
    np.testing.assert_array_equal(bucket(ahead, both_ways), expected.numpy())


def documents(model, catalog, histories):
    """Histories of items whose last is asked for."""
    tokens = model.vocabulary.encode(catalog.sids)
    pieces = [np.r_[model.vocabulary.bos_token, tokens[h].reshape(-1)] for h in histories]
    flat = np.concatenate(pieces).astype(np.int32)
    nothing = np.zeros(len(flat))
    made = Documents(
        flat,
        nothing.astype(np.float32),
        nothing.astype(np.int32),
        offsets_of([len(piece) for piece in pieces]),
    )
    ask_for_last_item(made, model.vocabulary.levels)
    return made


def logits_of(model, rows_at, batch: Batch) -> np.ndarray:
    @jax.jit
    def logits(batch):
        rows = rows_for(model, rows_at, batch.tokens, batch.segment_ids)
        return model.softmax_head().logits(model(batch, rows)[0])

    return np.asarray(logits(jax.tree.map(jnp.asarray, batch)))


def test_it_computes_what_transformers_t5_computes():
    """With T5's own choices: gated feed-forward, no norm of queries, no scale, untied."""
    shape = dataclasses.replace(DECODER, qk_norm=False, kv_heads=4, query_scale=1.0)
    model, _, catalog, rng = make_model(SIZES, 30, False, 0, shape, make_llm=make_encoder_decoder)
    history = rng.integers(0, 30, 4)
    batch = one_per_row(documents(model, catalog, [history]), 16)
    ours = logits_of(model, None, batch)[0]
    asked = np.flatnonzero(batch.loss_mask[0])

    t5 = T5ForConditionalGeneration(
        T5Config(
            vocab_size=model.vocabulary.size + 1,  # and what the decoder starts from
            d_model=24, d_kv=8, d_ff=32, num_heads=4, num_layers=3, num_decoder_layers=2,
            feed_forward_proj="gated-silu", dropout_rate=0.0, tie_word_embeddings=False,
            relative_attention_num_buckets=BUCKETS, relative_attention_max_distance=FAR,
            decoder_start_token_id=model.vocabulary.size,
        )
    ).eval()  # fmt: skip
    t5.lm_head = torch.nn.Linear(24, model.vocabulary.size + 1, bias=False)  # it ties them always
    t5.load_state_dict(_as_t5(nnx.to_pure_dict(nnx.state(model.llm, nnx.Param)), t5))
    first = asked[0] + 1
    with torch.no_grad():
        theirs = t5(
            input_ids=torch.tensor(batch.tokens[:1, :first]).long(),
            decoder_input_ids=torch.tensor(
                [[model.vocabulary.size, *batch.tokens[0, first : first + len(SIZES) - 1]]]
            ),
        ).logits[0]
    theirs = theirs[:, : model.vocabulary.size].numpy()
    assert np.std(theirs) > 0.3
    np.testing.assert_allclose(ours[asked], theirs, rtol=1e-4, atol=1e-5)


def _as_t5(params: dict, t5: T5ForConditionalGeneration) -> dict[str, torch.Tensor]:
    """Our weights by T5's names."""
    state = {}

    def put(name: str, value: np.ndarray) -> None:
        state[name] = torch.tensor(np.array(value, np.float32))

    def attention(name: str, layer: dict, prefix: str) -> None:
        for ours, theirs in (("query", "q"), ("key", "k"), ("value", "v")):
            weight = layer[prefix + ours]
            put(f"{name}.{theirs}.weight", weight.reshape(weight.shape[0], -1).T)
        output = layer[prefix + "output"]
        put(f"{name}.o.weight", output.reshape(-1, output.shape[-1]).T)

    for half, layers, norm in (
        ("encoder", "encoder_layers", "encoder_norm"),
        ("decoder", "layers", "final_norm"),
    ):
        put(f"{half}.final_layer_norm.weight", params[norm]["scale"])
        bias = f"{half}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
        put(bias, params[f"{half}_bias"])
        for number in range(len(params[layers]["query"])):
            layer = jax.tree.map(lambda leaf, at=number: leaf[at], params[layers])
            block, last = f"{half}.block.{number}.layer", 2 if half == "decoder" else 1
            attention(f"{block}.0.SelfAttention", layer, "")
            put(f"{block}.0.layer_norm.weight", layer["attention_norm"]["scale"])
            if half == "decoder":
                attention(f"{block}.1.EncDecAttention", layer, "cross_")
                put(f"{block}.1.layer_norm.weight", layer["cross_norm"]["scale"])
            put(f"{block}.{last}.layer_norm.weight", layer["mlp_norm"]["scale"])
            for ours, theirs in (("gate", "wi_0"), ("up", "wi_1"), ("down", "wo")):
                put(f"{block}.{last}.DenseReluDense.{theirs}.weight", layer[ours].T)
    embedding = np.concatenate([params["embedding"], np.asarray(params["start"])[None]])
    for name in ("shared", "encoder.embed_tokens", "decoder.embed_tokens"):
        put(f"{name}.weight", embedding)
    put("lm_head.weight", np.pad(np.asarray(params["head"]).T, ((0, 1), (0, 0))))
    assert set(state) == set(t5.state_dict())
    return state


@pytest.fixture(scope="module", params=[False, True], ids=["plain", "memory"])
def tiger(request):
    return make_model(SIZES, 40, request.param, 4, DECODER, make_llm=make_encoder_decoder)


def test_documents_that_share_a_row_know_nothing_of_each_other(tiger):
    model, rows_at, catalog, rng = tiger
    histories = [rng.integers(0, 40, length) for length in (3, 2, 4, 1)]
    alone = one_per_row(documents(model, catalog, histories), 14)
    together = pack(documents(model, catalog, histories), 24, 0, model.llm.answers)
    assert together.segment_ids.max(axis=1).tolist() == [2, 2]  # of which three would have fitted
    expected, found = (logits_of(model, rows_at, batch) for batch in (alone, together))
    seen = 0
    for row, segment in itertools.product((0, 1), (1, 2)):
        here = together.segment_ids[row] == segment
        tokens = together.tokens[row, here]
        which = next(
            n for n in range(4) if np.array_equal(alone.tokens[n][alone.segment_ids[n] > 0], tokens)
        )
        asked = together.loss_mask[row] * here > 0
        np.testing.assert_allclose(
            found[row, asked], expected[which, alone.loss_mask[which] > 0], rtol=1e-4, atol=1e-5
        )
        seen += asked.sum()
    assert seen == 4 * len(SIZES)


def test_rows_may_be_shorter_than_there_are_answers():
    """As prompts of nobody's history are, with SIDs of one level."""
    model, rows_at, *_ = make_model((7,), 5, False, 0, make_llm=make_encoder_decoder)
    bos = np.full((3, 1), model.vocabulary.bos_token, np.int32)
    ones = np.ones_like(bos)
    batch = Batch(bos, ones, 0 * ones, ones.astype(np.float32), 0 * ones)
    found = logits_of(model, rows_at, batch)
    assert found.shape == (3, 1, model.vocabulary.size) and np.isfinite(found).all()
    padded = jax.tree.map(lambda leaf: np.pad(leaf, ((0, 0), (0, 4))), batch)
    np.testing.assert_allclose(
        logits_of(model, rows_at, padded)[:, :1], found, rtol=1e-5, atol=1e-6
    )


def test_a_code_is_predicted_from_the_history_and_the_codes_before_it_alone(tiger):
    model, rows_at, catalog, rng = tiger
    batch = one_per_row(documents(model, catalog, [rng.integers(0, 40, 4)]), 16)
    before = logits_of(model, rows_at, batch)[0]
    asked = np.flatnonzero(batch.loss_mask[0])
    for level, at in enumerate(asked):
        tokens = batch.tokens.copy()
        codes = model.vocabulary.token_range(level + 1)
        tokens[0, at + 1] = codes[0] + (tokens[0, at + 1] - codes[0] + 1) % SIZES[level]
        after = logits_of(model, rows_at, batch._replace(tokens=tokens))[0]
        moved = np.abs(after - before).max(axis=1)[asked]
        assert (moved[: level + 1] == 0).all() and (moved[level + 1 :] > 1e-3).all()
    tokens = batch.tokens.copy()
    tokens[0, 1] = 1 - tokens[0, 1] if tokens[0, 1] in (0, 1) else tokens[0, 1] - 1
    after = logits_of(model, rows_at, batch._replace(tokens=tokens))[0]
    assert (np.abs(after - before).max(axis=1)[asked] > 1e-3).all()


TRAINED = [
    "quickstart/prefixmem", "init.run=none", "init.take=()", "init.fresh=()", "objective=tiger",
    "steps=40", "model.layers=1", "model.d_model=32", "model.dropout=0.1", "data.batch_size=8",
    "data.synthetic.items=300", "data.synthetic.users=400", "data.synthetic.children=(8,4,4,4)",
    "data.synthetic.codebook_sizes=(8,8,8,8)", "sid_encoder.rows=512", "sid_encoder.d_mem=16",
    "evaluation.every_steps=20", "evaluation.validation_examples=30", "evaluation.users=40",
]  # fmt: skip


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiger")
    prefixmem("train", *TRAINED, "--out", folder / "whole")
    return folder


def test_a_run_learns_and_is_evaluated_as_any_other(trained):
    losses = [
        one["validation/loss"]
        for one in read_metrics(trained / "whole")
        if "validation/loss" in one
    ]
    assert losses[-1] < losses[0] - 0.05

    prefixmem("evaluate", trained / "whole", "--heuristics")
    scores = load_scores(trained / "whole")
    assert 0 < np.nanmean(scores["item_recall@10/constrained"]) < 1
    assert 0 < scores["tf_accuracy/level_4"].mean() < 1
    said = prefixmem("recommend", trained / "whole", "--history", "1,2,3", "--top", "3").stdout
    assert len(said.splitlines()) >= 3


def test_its_memory_goes_into_a_decoder_and_itself_into_no_hugging_face_folder(trained):
    taken = [one for one in TRAINED if not one.startswith(("init", "objective", "steps"))]
    prefixmem(
        "train", *taken, "steps=1", f"init.run={trained / 'whole'}", "init.take=('memory',)",
        "init.fresh=('llm','sid_encoder')", "optimizer.learning_rate=1e-9", "--out", trained / "llm",
    )  # fmt: skip
    before, after = (state_of(trained / name)[1] for name in ("whole", "llm"))
    assert np.abs(before.memory).max() > 1e-3
    np.testing.assert_allclose(after.memory, before.memory, atol=1e-7)
    done = prefixmem("export", trained / "whole", "--out", trained / "out", expect=2)
    assert "a tiger run has no decoder that Hugging Face knows" in done.stderr.splitlines()[-1]
    assert not (trained / "out").exists()


def test_mistakes_are_one_line(refused):
    for overrides, message in (
        (['objective.documents=[{"kind":"items"}]'], "tiger learns from next_item alone"),
        (["model.sliding_layers=(0,)", "model.sliding_window=4"], "tiger has relative positions"),
        (["model.post_norms=true"], "tiger has relative positions and T5's layers"),
        (["data.tokenizer=some"], "tiger speaks SIDs alone"),
    ):
        assert message in refused("train", *TRAINED, *overrides, "--out", "nowhere")
