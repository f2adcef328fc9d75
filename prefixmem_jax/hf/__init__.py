"""Hugging Face checkpoints: what their configs mean, where their weights go, reading them."""
