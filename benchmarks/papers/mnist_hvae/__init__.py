"""HVAE against VAE on MNIST: run ``python benchmarks/papers/mnist_hvae.py``."""
