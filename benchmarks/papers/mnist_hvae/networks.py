"""The paper's networks, and the two models that are built from them."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence

import torch
from torch import nn

import fastvae

Model = fastvae.HVAE | fastvae.VAE


def networks(shape: Sequence[int]) -> tuple[nn.Module, nn.Module]:
    """Encoder and decoder for images [C, H, W]: the paper's for 1x28x28, else dense ones with 16 latents."""
    if tuple(shape) != (1, 28, 28):
        size = math.prod(shape)
        encoder = nn.Sequential(nn.Flatten(), nn.Linear(size, 64), nn.Softplus(), nn.Linear(64, 32))
        decoder = nn.Sequential(
            nn.Linear(16, 64), nn.Softplus(), nn.Linear(64, size), nn.Unflatten(1, tuple(shape))
        )
        return encoder, decoder
    return fastvae.architectures.hvae_encoder(), fastvae.architectures.hvae_decoder()


def build(kind: str, shape: Sequence[int], seed: int, arguments: argparse.Namespace) -> Model:
    """An untrained "HVAE" or "VAE"; for one seed both have the same networks."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        encoder, decoder = networks(shape)
    if kind == "VAE":
        return fastvae.VAE(encoder, decoder).to(arguments.device)
    steps = arguments.leapfrog_steps
    # "drop": one trajectory that diverges should not end a run of hours; they are counted and reported.
    return fastvae.HVAE(
        encoder,
        decoder,
        num_steps=steps,
        tempering="free",
        step_size=torch.full((steps, 1), arguments.step_size),
        on_divergence="drop",
    ).to(arguments.device)
