"""The paper's networks, and the two models that are built from them."""

from __future__ import annotations

import argparse

import torch
from torch import nn

import fastvae
from fastvae.architectures import jacobian_l1_decoder, jacobian_l1_encoder
from fastvae.penalties import BetaAnnealing

LATENTS = 10


def networks(size: int) -> tuple[nn.Module, nn.Module]:
    """Encoder and decoder for images [1, size, size]: the paper's for 64, else small dense ones."""
    if size != 64:
        pixels, hidden = size * size, 64
        encoder = nn.Sequential(
            nn.Flatten(), nn.Linear(pixels, hidden), nn.ReLU(), nn.Linear(hidden, 2 * LATENTS)
        )
        decoder = nn.Sequential(
            nn.Linear(LATENTS, hidden), nn.ReLU(), nn.Linear(hidden, pixels), nn.Unflatten(1, (1, size, size))
        )
        return encoder, decoder
    return jacobian_l1_encoder(LATENTS), jacobian_l1_decoder(latent_dim=LATENTS)


def build(kind: str, seed: int, arguments: argparse.Namespace) -> fastvae.VAE:
    """An untrained "JL1-VAE" or "beta-VAE"; for one seed both have the same weights."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        encoder, decoder = networks(arguments.size)
    beta, anneal_steps = arguments.beta, arguments.anneal_steps
    if kind == "JL1-VAE":
        return fastvae.JacobianL1VAE(
            encoder, decoder, beta=beta, gamma=arguments.gamma, anneal_steps=anneal_steps
        ).to(arguments.device)
    return fastvae.VAE(encoder, decoder, beta=beta, penalties=[BetaAnnealing(anneal_steps)]).to(
        arguments.device
    )
