"""Influence in closed form and its sampling error: run ``python benchmarks/papers/influence.py``."""
