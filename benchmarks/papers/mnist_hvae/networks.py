"""The paper's networks, and the two models that are built from them."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence

from torch import nn

import fastvae

from ..shared import build_model

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
    """See :func:`build_model`; on the device of the run."""
    return build_model(kind, lambda: networks(shape), seed, arguments).to(arguments.device)
