"""The Gaussian testbed of the Hamiltonian VAE paper, whose evidence is known exactly.

Caterini, Doucet, Sejdinovic, Hamiltonian Variational Auto-Encoder, NeurIPS 2018, section 4.1. Run
``python -m benchmarks.papers.gaussian``.
"""
