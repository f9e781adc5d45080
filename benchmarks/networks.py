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


def dense(size: int, hidden: int, latents: int) -> tuple[nn.Sequential, nn.Sequential]:
    """Encoder of images of size x size pixels to their 2 latents, and decoder, of two hidden layers each."""
    numel = size * size
    encoder = nn.Sequential(nn.Flatten(), *mlp(numel, hidden, hidden, 2 * latents))
    return encoder, mlp(latents, hidden, hidden, numel)
