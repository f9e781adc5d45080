"""HVAE against VAE on MNIST: run ``python -m benchmarks.papers.mnist_hvae``."""
