"""Consistency regularisation, scaled down: run ``python -m benchmarks.papers.consistency``."""
