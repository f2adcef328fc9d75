"""Judging recommendations: metrics, heuristics, the evaluator, the report."""
