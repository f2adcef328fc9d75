"""Run folders: config, checkpoints by part, and how to open them."""
