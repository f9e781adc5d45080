"""JL1-VAE against beta-VAE on three dots: run ``python benchmarks/papers/disentanglement.py``."""
