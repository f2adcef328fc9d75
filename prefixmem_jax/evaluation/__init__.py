"""Evaluating recommendations: metrics, heuristics, the evaluator, the report."""
