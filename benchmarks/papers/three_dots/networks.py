"""The paper's networks, and the two models that are built from them."""

from __future__ import annotations

import argparse

import torch
from torch import nn

import fastvae
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
    encoder = nn.Sequential(
        nn.Conv2d(1, 32, 4, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(32, 32, 4, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(32, 64, 4, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(64, 64, 4, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(1024, 256),
        nn.ReLU(),
        nn.Linear(256, 2 * LATENTS),
    )
    # Without the paper's sigmoid: the likelihood takes logits, and the penalty adds the sigmoid itself.
    decoder = nn.Sequential(
        nn.Linear(LATENTS, 256),
        nn.ReLU(),
        nn.Linear(256, 1024),
        nn.ReLU(),
        nn.Unflatten(1, (64, 4, 4)),
        nn.ConvTranspose2d(64, 64, 4, stride=2, padding=1),
        nn.ReLU(),
        nn.ConvTranspose2d(64, 32, 4, stride=2, padding=1),
        nn.ReLU(),
        nn.ConvTranspose2d(32, 32, 4, stride=2, padding=1),
        nn.ReLU(),
        nn.ConvTranspose2d(32, 1, 4, stride=2, padding=1),
    )
    return encoder, decoder


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
