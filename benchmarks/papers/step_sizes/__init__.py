"""HVAE's step sizes on colour images: run ``python -m benchmarks.papers.step_sizes``."""
