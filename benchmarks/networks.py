"""The dense networks of the benchmarks."""

from __future__ import annotations

import itertools

from torch import nn


def mlp(*widths: int, activation: type[nn.Module] = nn.ReLU) -> nn.Sequential:
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
