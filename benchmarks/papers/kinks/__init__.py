"""The Jacobian penalty of decoders with kinks: run ``python -m benchmarks.papers.kinks``."""
