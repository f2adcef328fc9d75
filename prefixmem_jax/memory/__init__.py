"""The memory table: prefix hash, sharded rows, their exchange and their optimizers."""
