"""VAE-TracIn on images: run ``python benchmarks/papers/retrieval.py``."""
