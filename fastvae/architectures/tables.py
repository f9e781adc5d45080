"""Encoders and decoders for rows of numbers, with or without a condition."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastvae.architectures.naming import named
from fastvae.arguments import expect_integers

__all__ = ["table_decoder", "table_encoder", "table_networks"]


def table_networks(
    features: int,
    latent_dim: int = 16,
    *,
    width: int = 128,
    values_per_element: int = 1,
    condition: int = 0,
    counts: bool = False,
) -> tuple[nn.Module, nn.Module]:
    """An encoder and a decoder for rows of numbers: two hidden layers each, with ELU.

    Args:
        features: F, numbers of a row.
        latent_dim: d.
        width: units of a hidden layer.
        values_per_element: outputs of the decoder for one number of a row, as its likelihood wants them.
        condition: C, numbers that both networks are given besides, as ``encoder(x, condition)``; 0: none.
        counts: the encoder sees log(1 + x).

    Returns:
        (encoder, decoder): modules from [B, F] to [B, 2 d], mean and log variance, and from [B, d] to
        [B, F * values_per_element]; with a condition [B, C] as their second argument.

    Raises:
        ValueError: sizes that are not integers above 0 (``condition``: of at least 0).
    """
    encoder = table_encoder(features, latent_dim, width=width, condition=condition, counts=counts)
    decoder = table_decoder(
        features, latent_dim, width=width, values_per_element=values_per_element, condition=condition
    )
    return encoder, decoder


@named
def table_encoder(
    features: int, latent_dim: int = 16, *, width: int = 128, condition: int = 0, counts: bool = False
) -> nn.Module:
    """The encoder of :func:`table_networks`."""
    expect_integers("table_encoder", 1, features=features, latent_dim=latent_dim, width=width)
    expect_integers("table_encoder", 0, condition=condition)
    layers = _layers(features + condition, width, 2 * latent_dim)
    if not counts:
        return _Conditioned(layers) if condition else layers
    return _Conditioned(layers, Log1p()) if condition else nn.Sequential(Log1p(), *layers)


@named
def table_decoder(
    features: int, latent_dim: int = 16, *, width: int = 128, values_per_element: int = 1, condition: int = 0
) -> nn.Module:
    """The decoder of :func:`table_networks`."""
    expect_integers("table_decoder", 1, features=features, latent_dim=latent_dim, width=width)
    expect_integers("table_decoder", 1, values_per_element=values_per_element)
    expect_integers("table_decoder", 0, condition=condition)
    layers = _layers(latent_dim + condition, width, features * values_per_element)
    return _Conditioned(layers) if condition else layers


class Log1p(nn.Module):
    """log(1 + x) of counts."""

    def forward(self, x: Tensor) -> Tensor:
        """Element by element."""
        return torch.log1p(x)


class _Conditioned(nn.Module):
    """Layers of their input and a condition side by side.

    Args:
        layers: from [B, F + C].
        first: of the input alone.
    """

    def __init__(self, layers: nn.Sequential, first: nn.Module | None = None) -> None:
        super().__init__()
        self.first = nn.Identity() if first is None else first
        self.layers = layers

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """Of x [B, F] and a condition [B, C]."""
        return self.layers(torch.cat((self.first(x), condition), 1))


def _layers(inputs: int, width: int, outputs: int) -> nn.Sequential:
    hidden = [nn.Linear(inputs, width), nn.ELU(), nn.Linear(width, width), nn.ELU()]
    return nn.Sequential(*hidden, nn.Linear(width, outputs))
