"""Encoders and decoders for images of any size, with PyTorch's initial weights."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from fastvae.architectures.naming import named
from fastvae.arguments import expect, expect_integers, is_integer

__all__ = ["image_decoder", "image_encoder", "image_networks"]

_SMALLEST = 7
"""Images are halved until a side is at most this, or odd."""
_LARGEST = 8
"""So long may both sides be then."""


def image_networks(
    shape: Sequence[int], latent_dim: int = 32, *, width: int = 32, values_per_element: int = 1
) -> tuple[nn.Sequential, nn.Sequential]:
    """An encoder and a decoder for images of 8, 16, 28, 32, 48, 64, ... pixels, grey or colour.

    Plain convolutions of stride 2 and ELU between them, without norms: every model and penalty of the package trains
    with them, kernels take both, and the decoder is smooth enough for exact gradients of ``JacobianL1``.

    Args:
        shape: (C, H, W) of an image.
        latent_dim: d.
        width: channels of the outermost convolution; twice and four times that further in. 256 hidden units.
        values_per_element: outputs of the decoder for one element of an image, as its likelihood wants them: 1, 2 for
            ``GaussianHead``, 256 for ``Categorical``.

    Returns:
        (encoder, decoder): a module from [B, C, H, W] to [B, 2 d], mean and log variance; a module from [B, d] to
        [B, C * values_per_element, H, W].

    Raises:
        ValueError: a size that cannot be halved until it is at most 8; sizes that are not integers above 0.
    """
    encoder = image_encoder(shape, latent_dim, width=width)
    return encoder, image_decoder(shape, latent_dim, width=width, values_per_element=values_per_element)


@named
def image_encoder(shape: Sequence[int], latent_dim: int = 32, *, width: int = 32) -> nn.Sequential:
    """The encoder of :func:`image_networks`."""
    channels, height, width_left = _plan("image_encoder", shape, latent_dim, width)
    layers: list[nn.Module] = []
    for inner, outer in zip(channels[1:], channels[:-1], strict=True):
        layers += [nn.Conv2d(outer, inner, 4, stride=2, padding=1), nn.ELU()]
    hidden = channels[-1] * height * width_left
    layers += [nn.Flatten(), nn.Linear(hidden, 256), nn.ELU(), nn.Linear(256, 2 * latent_dim)]
    return nn.Sequential(*layers)


@named
def image_decoder(
    shape: Sequence[int], latent_dim: int = 32, *, width: int = 32, values_per_element: int = 1
) -> nn.Sequential:
    """The decoder of :func:`image_networks`."""
    channels, height, width_left = _plan("image_decoder", shape, latent_dim, width, values_per_element)
    hidden = channels[-1] * height * width_left
    layers: list[nn.Module] = [nn.Linear(latent_dim, 256), nn.ELU(), nn.Linear(256, hidden), nn.ELU()]
    layers.append(nn.Unflatten(1, (channels[-1], height, width_left)))
    outputs = [channels[0] * values_per_element, *channels[1:-1]]
    for inner, outer in zip(channels[:0:-1], outputs[::-1], strict=True):
        layers += [nn.ConvTranspose2d(inner, outer, 4, stride=2, padding=1), nn.ELU()]
    return nn.Sequential(*layers[:-1])


def _plan(owner: str, shape: Sequence[int], *sizes: int) -> tuple[list[int], int, int]:
    """Channels from the image inwards, and height and width there; ``sizes`` are latent_dim, width, ..."""
    named = {
        "latent_dim": sizes[0],
        "width": sizes[1],
        "values_per_element": sizes[2] if len(sizes) > 2 else 1,
    }
    expect_integers(owner, 1, optional=False, **named)
    expect(
        len(shape) == 3 and all(is_integer(size) and size >= 1 for size in shape),
        f"{owner}: shape: expected (channels, height, width)",
        tuple(shape),
    )
    found, height, width = [int(shape[0])], int(shape[1]), int(shape[2])
    while height % 2 == width % 2 == 0 and min(height, width) > _SMALLEST:
        height, width = height // 2, width // 2
        found.append(min(2 ** (len(found) - 1), 4) * sizes[1])
    if len(found) == 1 or height * width > _LARGEST**2:
        raise ValueError(
            f"{owner}: shape: expected sides that can be halved to at most {_LARGEST}, such as 28, 32, 48 or 64, got "
            f"{shape[1]}x{shape[2]}; fastvae.data.load(..., size=32) scales images"
        )
    return found, height, width
