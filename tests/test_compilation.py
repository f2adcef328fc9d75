"""What one command compiled, the next one need not."""

import subprocess
import sys

import jax
from conftest import command_environment

from prefixmem_jax.parallel.compilation import keep_compiled_programs

TRAIN = [
    "train", "quickstart/baseline", "data.synthetic.items=300", "data.synthetic.users=300",
    "data.batch_size=8", "data.sequence_length=64", "model.layers=1", "model.d_model=32", "steps=1",
    "evaluation.validation_examples=20",
]  # fmt: skip


def test_programs_are_kept_in_the_users_cache_folder(tmp_path):
    environment = command_environment() | {"XDG_CACHE_HOME": str(tmp_path / "cache")}
    del environment["JAX_COMPILATION_CACHE_DIR"]
    kept = []
    for out in ("one", "two"):
        command = [sys.executable, "-m", "prefixmem_jax.cli", *TRAIN, "--out", str(tmp_path / out)]
        subprocess.run(command, env=environment, check=True, timeout=300)
        kept.append(sorted(tmp_path.glob("cache/prefixmem_jax/programs-*/*-cache")))
    assert kept[0] == kept[1]
    assert any("validation_step" in path.name for path in kept[0])


def test_where_that_cannot_be_written_nothing_is(tmp_path, monkeypatch):
    (tmp_path / "cache").write_text("a file")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    of_the_tests = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", None)
    try:
        keep_compiled_programs()
        assert jax.config.jax_compilation_cache_dir is None
    finally:
        jax.config.update("jax_compilation_cache_dir", of_the_tests)
    keep_compiled_programs()  # what is named stays
    assert jax.config.jax_compilation_cache_dir == of_the_tests
