"""The dense networks of the benchmarks."""

from __future__ import annotations

import itertools
from collections.abc import Callable

from torch import nn


def mlp(*widths: int, activation: Callable[[], nn.Module] = nn.ReLU) -> nn.Sequential:
    layers: list[nn.Module] = []
    for before, after in itertools.pairwise(widths):
        layers += [nn.Linear(before, after), activation()]
    return nn.Sequential(*layers[:-1])


def softplus_mlp(*widths: int) -> nn.Sequential:
    return mlp(*widths, activation=nn.Softplus)


def wide_decoder() -> nn.Sequential:
    """Transposed convolutions of 1024, 512 and 256 channels to 28x28 logits, as in pythae's decoder for MNIST."""
    return nn.Sequential(
        nn.Linear(16, 1024 * 4 * 4),
        nn.Unflatten(1, (1024, 4, 4)),
        nn.ConvTranspose2d(1024, 512, 3, stride=2, padding=1),
        nn.BatchNorm2d(512),
        nn.ReLU(),
        nn.ConvTranspose2d(512, 256, 3, stride=2, padding=1, output_padding=1),
        nn.BatchNorm2d(256),
        nn.ReLU(),
        nn.ConvTranspose2d(256, 1, 3, stride=2, padding=1, output_padding=1),
    ).eval()


def dense(size: int, hidden: int, latents: int) -> tuple[nn.Sequential, nn.Sequential]:
    """Encoder of images of size x size pixels to their 2 latents, and decoder, of two hidden layers each."""
    numel = size * size
    encoder = nn.Sequential(nn.Flatten(), *mlp(numel, hidden, hidden, 2 * latents))
    return encoder, mlp(latents, hidden, hidden, numel)


def colour(channels: int, latents: int) -> tuple[nn.Sequential, nn.Sequential]:
    """Three strided convolutions from 32x32 colour images, of one to four times so many channels, and three back."""
    one, two, four = channels, 2 * channels, 4 * channels
    encoder = nn.Sequential(
        nn.Conv2d(3, one, 4, 2, 1), nn.ReLU(),
        nn.Conv2d(one, two, 4, 2, 1), nn.ReLU(),
        nn.Conv2d(two, four, 4, 2, 1), nn.ReLU(),
        nn.Flatten(),
        nn.Linear(16 * four, 2 * latents),
    )  # fmt: skip
    decoder = nn.Sequential(
        nn.Linear(latents, 16 * four), nn.ReLU(),
        nn.Unflatten(1, (four, 4, 4)),
        nn.ConvTranspose2d(four, two, 4, 2, 1), nn.ReLU(),
        nn.ConvTranspose2d(two, one, 4, 2, 1), nn.ReLU(),
        nn.ConvTranspose2d(one, 3, 4, 2, 1),
    )  # fmt: skip
    return encoder, decoder
