"""Histories to batches: formats, splits, documents, packing, the Grain pipeline."""
