"""HVAE against VAE, both trained until they stop improving: run ``python -m benchmarks.papers.converged``."""
