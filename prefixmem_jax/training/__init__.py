"""One loop for every stage: objectives, optimizers, step, checkpoints, metrics."""
