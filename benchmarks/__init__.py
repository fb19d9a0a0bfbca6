"""Measurements: one program a question, results with their commit under benchmarks/results."""
