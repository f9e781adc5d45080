"""JL1-VAE against beta-VAE on three dots: run ``python -m benchmarks.papers.disentanglement``."""
