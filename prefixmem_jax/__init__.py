"""PrefixMem (arXiv 2606.00324) in JAX: encoders that let an LLM speak Semantic IDs."""

__version__ = "0.1.0"
