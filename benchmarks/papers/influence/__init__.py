"""Influence in closed form and its sampling error: run ``python -m benchmarks.papers.influence``."""
