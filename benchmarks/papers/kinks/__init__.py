"""The Jacobian penalty of decoders with kinks: run ``python benchmarks/papers/kinks.py``."""
