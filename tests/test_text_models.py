"""Vectors of titles by a text encoder: as the folder says, whatever is in the same batch."""

import json

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from conftest import prefixmem
from transformers import AutoModel, AutoTokenizer, BertConfig, BertModel

from prefixmem_jax.data.texts import train_tokenizer, write_tokenizer
from prefixmem_jax.errors import UserError
from prefixmem_jax.semantic_ids import text_models
from prefixmem_jax.semantic_ids.text_models import embed_titles

TITLES = ["red lamp", None, "a blue chair that is rather long", "cup", "green table 4"] * 5
PREFIX = "sentence_transformers.models."


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A folder of transformers: a small encoder and its tokenizer."""
    folder = tmp_path_factory.mktemp("encoder")
    write_tokenizer(train_tokenizer([title or "" for title in TITLES], 280), folder)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=300, hidden_size=24, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=32, max_position_embeddings=64,
    )  # fmt: skip
    BertModel(config).save_pretrained(folder)
    return folder


def sentence_folder(path, plain, pooling, normalize=True, more=()):
    """The same as a folder of sentence-transformers."""
    path.mkdir()
    (path / "0_Transformer").symlink_to(plain)
    modules = [
        {"type": f"{PREFIX}Transformer", "path": "0_Transformer"},
        {"type": f"{PREFIX}Pooling", "path": "1_Pooling"},
        *([{"type": f"{PREFIX}Normalize", "path": "2_Normalize"}] if normalize else []),
        *({"type": f"{PREFIX}{name}", "path": "3"} for name in more),
    ]
    (path / "modules.json").write_text(json.dumps(modules))
    (path / "1_Pooling").mkdir()
    (path / "1_Pooling" / "config.json").write_text(
        json.dumps({"word_embedding_dimension": 24, **dict.fromkeys(pooling, True)})
    )
    return path


def alone(plain) -> list[np.ndarray]:
    """Hidden states of every title, one at a time, without padding."""
    model, tokenizer = AutoModel.from_pretrained(plain), AutoTokenizer.from_pretrained(plain)
    model.eval()
    found = []
    for title in TITLES:
        tokens = tokenizer(title or "-", return_tensors="pt")
        with torch.inference_mode():
            found.append(model(tokens.input_ids.long()).last_hidden_state[0].numpy())
    return found


@pytest.mark.parametrize("way", ["mean", "cls", "lasttoken"])
def test_vectors_are_those_of_every_title_alone(plain, tmp_path, monkeypatch, way):
    monkeypatch.setattr(text_models, "BATCH", 7)
    key = {"mean": "mean_tokens", "cls": "cls_token", "lasttoken": "lasttoken"}[way]
    folder = sentence_folder(tmp_path / "s", plain, [f"pooling_mode_{key}"])
    vectors = embed_titles(folder, TITLES, tmp_path / "v.npy").take(np.arange(len(TITLES)))
    for states, vector in zip(alone(plain), vectors, strict=True):
        expected = {"mean": states.mean(0), "cls": states[0], "lasttoken": states[-1]}[way]
        np.testing.assert_allclose(
            vector, expected / np.linalg.norm(expected), rtol=1e-4, atol=1e-5
        )


def test_a_folder_of_transformers_alone_is_averaged(plain, tmp_path):
    vectors = embed_titles(plain, TITLES, tmp_path / "v.npy")
    assert (vectors.count, vectors.width) == (25, 24)
    states = alone(plain)
    np.testing.assert_allclose(
        vectors.take(np.array([2]))[0], states[2].mean(0), rtol=1e-4, atol=1e-5
    )


def test_sids_of_a_text_encoder(plain, tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    import pyarrow as pa

    titles = [title or "x" for title in TITLES]
    pq.write_table(pa.table({"item_id": range(25), "title": titles}), data / "items.parquet")
    made = ["quantizer.codes=(4,4)", "quantizer.iterations=3", f"text_model={plain}"]
    prefixmem("sids", data, "--out", tmp_path / "x", *made)
    first = pq.read_table(tmp_path / "x" / "items.parquet")["sid"].to_pylist()
    assert len({sid[0] for sid in first[:5]}) > 1
    # The same titles have the same vectors: they share all codes that collisions leave alone.
    assert all(first[i][0] == first[i % 5][0] for i in range(25))
    prefixmem("sids", data, "--out", tmp_path / "y", "--apply", tmp_path / "x")
    assert pq.read_table(tmp_path / "y" / "items.parquet")["sid"].to_pylist() == first


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda path, plain: path.mkdir(), "no config.json; expected the folder of a text encoder"),
        (
            lambda path, plain: sentence_folder(
                path, plain, ["pooling_mode_mean_tokens"], True, ["Dense"]
            ),
            "Dense is not supported; Transformer, Pooling and Normalize are",
        ),
        (
            lambda path, plain: sentence_folder(path, plain, ["pooling_mode_max_tokens"]),
            r"pools by \['pooling_mode_max_tokens'\]; expected one of",
        ),
        (
            lambda path, plain: (path.mkdir(), (path / "config.json").write_text("{}")),
            "no text encoder",
        ),
        (
            lambda path, plain: (path.mkdir(), (path / "modules.json").write_text("{}")),
            "modules.json: expected a JSON list, got dict",
        ),
    ],
)
def test_folders_that_are_none_are_one_line(plain, tmp_path, make, words):
    make(tmp_path / "folder", plain)
    with pytest.raises(UserError, match=words):
        embed_titles(tmp_path / "folder", TITLES, tmp_path / "v.npy")
    assert not (tmp_path / "v.npy").exists()
