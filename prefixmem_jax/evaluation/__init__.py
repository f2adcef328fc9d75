"""Judging recommendations: metrics, floors, the evaluator, the report."""
