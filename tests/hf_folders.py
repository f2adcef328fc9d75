"""Model folders as their users find them, and what faults injected into them must end with."""

import json
from pathlib import Path

import pytest
import tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Qwen3Config

from prefixmem_jax.errors import UserError

TEXT_TOKENS = 64


def save_model(folder: Path) -> Path:
    """A Qwen3 in several files, with a tokenizer."""
    config = Qwen3Config(
        vocab_size=TEXT_TOKENS, hidden_size=24, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(folder, max_shard_size="10KB")
    inner = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token="?"))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=60, special_tokens=["?", "</s>"])
    inner.train_from_iterator(["the quick brown fox jumps over the lazy dog"] * 3, trainer)
    PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="</s>").save_pretrained(folder)
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    """Every file under a folder, hidden ones and links too."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else b"link"
        for path in sorted(folder.rglob("*"))
        if not path.is_dir()
    }


def refused(function, *arguments, **options) -> str:
    """The one line that a fault ends with."""
    with pytest.raises(UserError) as caught:
        function(*arguments, **options)
    line = str(caught.value)
    assert "\n" not in line and len(line) < 900, line
    return line


def edit_json(path: Path, change) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
