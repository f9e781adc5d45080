"""VAE-TracIn on images: run ``python -m benchmarks.papers.retrieval``."""
