"""The papers' experiments, in small: one folder each, ``python -m benchmarks.papers.NAME``."""
