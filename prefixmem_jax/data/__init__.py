"""Histories to batches: dataset format, splits, token sequences, Grain pipeline."""
