"""What one command compiled, the next one need not."""

import forked
import pytest
from conftest import command_environment

TRAIN = [
    "train", "quickstart/baseline", "data.synthetic.items=300", "data.synthetic.users=300",
    "data.batch_size=8", "data.sequence_length=64", "model.layers=1", "model.d_model=32", "steps=1",
    "evaluation.validation_examples=20",
]  # fmt: skip


@pytest.fixture
def train(tmp_path):
    def run(out: str, cache: str) -> None:
        environment = command_environment() | {"XDG_CACHE_HOME": str(tmp_path / cache)}
        del environment["JAX_COMPILATION_CACHE_DIR"]
        command = [*TRAIN, "--out", str(tmp_path / out)]
        done = forked.run(forked.command, command, environment, timeout=300)
        assert done.returncode == 0, done.stderr

    return run


def test_programs_are_kept_in_the_users_cache_folder(train, tmp_path):
    kept = []
    for out in ("one", "two"):
        train(out, "cache")
        kept.append(sorted(tmp_path.glob("cache/prefixmem_jax/programs-*/*-cache")))
    assert kept[0] == kept[1]
    assert any("train_step" in path.name or "lambda" in path.name for path in kept[0])
    assert any("validation_step" in path.name for path in kept[0])


def test_where_that_cannot_be_written_all_is_as_before(train, tmp_path):
    (tmp_path / "cache").write_text("a file")
    train("one", "cache")
    assert (tmp_path / "cache").read_text() == "a file"
