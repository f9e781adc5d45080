"""Images drawn from known factors, for measuring disentanglement: three dots, and shapes as in dSprites."""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from fastvae.arguments import expect, expect_at_least, expect_numbers
from fastvae.data.factors import FactorDataset, FactorSpace

__all__ = ["shapes", "three_dots"]

_SHAPES = ("square", "ellipse", "heart")


def three_dots(
    num_images: int = 10_000,
    *,
    size: int = 64,
    values: int = 64,
    radius: float = 0.08,
    seed: int = 0,
) -> FactorDataset:
    """Three black dots on white at independent places, which may overlap and leave the image by half.

    The data of Rhodes and Lee, "Local Disentanglement in Variational Auto-Encoders Using Jacobian L1
    Regularization", NeurIPS 2021: 1x64x64, radius 0.08 of the side, grey edges. The dots look alike, so that
    different factors may give the same image.

    Args:
        num_images: drawn at random, of the values^6 that there are.
        size: side in pixels.
        values: places of a dot along a side, at equal distances.
        radius: of a dot, in sides of the image.
        seed: of the factors; torch's global generator is not touched.

    Returns:
        :class:`FactorDataset` with the factors "x of dot 1", "y of dot 1", "x of dot 2", ...: 0 is the left
        or upper border, values - 1 the right or lower one.

    Raises:
        ValueError: num_images below 1, size or values below 2, radius outside (0, 0.5].
    """
    _check("three_dots", num_images, size)
    expect_at_least("three_dots", 2, values=values)
    expect_numbers("three_dots", radius=radius, seed=seed)
    expect(0 < radius <= 0.5, "three_dots: radius: expected a number in (0, 0.5]", radius)
    names = tuple(f"{axis} of dot {dot}" for dot in (1, 2, 3) for axis in "xy")
    draw = functools.partial(_draw_dots, size=size, values=values, radius=radius)
    space = FactorSpace("three dots", names, (values,) * 6, (1, size, size), draw)
    return FactorDataset(space, space.sample(num_images, torch.Generator().manual_seed(int(seed))))


def shapes(num_images: int = 10_000, *, size: int = 64, seed: int = 0) -> FactorDataset:
    """One white square, ellipse or heart on black, in pixels of 0 or 1 (255 in bytes).

    The factors of dSprites (Matthey, Higgins, Hassabis, Lerchner, 2017), drawn by formulas of our own: not
    the same pixels, and no orientation comes twice. At 1x64x64 there are 737,280 images.

    Args:
        num_images: drawn at random, with repetition.
        size: side in pixels.
        seed: of the factors; torch's global generator is not touched.

    Returns:
        :class:`FactorDataset` with the factors shape (0 square, 1 ellipse, 2 heart), scale (6 values, half to
        full size), rotation (40 values, 9 degrees each), x and y (32 values each, such that no
        shape is cut off).

    Raises:
        ValueError: num_images below 1 or size below 2.
    """
    _check("shapes", num_images, size)
    draw = functools.partial(_draw_shapes, size=size)
    names, sizes = ("shape", "scale", "rotation", "x", "y"), (len(_SHAPES), 6, 40, 32, 32)
    space = FactorSpace("shapes", names, sizes, (1, size, size), draw)
    return FactorDataset(space, space.sample(num_images, torch.Generator().manual_seed(int(seed))))


def _check(name: str, num_images: int, size: int) -> None:
    expect_at_least(name, 1, num_images=num_images)
    expect_numbers(name, size=size)
    expect(size >= 2, f"{name}: size: expected at least 2 pixels", size)


def _pixel_centres(like: Tensor, size: int) -> Tensor:
    """Coordinates of pixel centres along a side that goes from 0 to 1: [size]."""
    return (torch.arange(size, device=like.device, dtype=torch.float32) + 0.5) / size


def _draw_dots(factors: Tensor, size: int, values: int, radius: float) -> Tensor:
    pixels = _pixel_centres(factors, size)
    centres = factors.to(torch.float32) / (values - 1)
    squares = (pixels - centres[:, :, None]).square()
    across, down = squares[:, 0::2], squares[:, 1::2]
    nearest = (down[..., :, None] + across[..., None, :]).amin(1).sqrt()
    # A pixel at the edge is as white as much of it lies outside, to first order in its size.
    white = ((nearest - radius) * size + 0.5).clamp(0, 1)
    return (255 * white).round().to(torch.uint8)[:, None]


def _draw_shapes(factors: Tensor, size: int) -> Tensor:
    kind, scale, rotation, x, y = (column[:, None, None] for column in factors.to(torch.float32).unbind(1))
    half = 0.14 * (0.5 + scale / 10)
    pixels = _pixel_centres(factors, size)
    across = (pixels[None, None, :] - (0.2 + 0.6 * x / 31)) / half
    up = ((0.2 + 0.6 * y / 31) - pixels[None, :, None]) / half
    angle = rotation * (2 * math.pi / 40)
    # The shape turns, so the pixel turns back.
    u = torch.cos(angle) * across + torch.sin(angle) * up
    v = torch.cos(angle) * up - torch.sin(angle) * across
    inside = torch.where(
        kind == 0,
        torch.maximum(u.abs(), v.abs()) <= 0.9,
        torch.where(
            kind == 1,
            u.square() + 4 * v.square() <= 1.5,
            _in_heart(1.1 * u, 1.1 * v),
        ),
    )
    return inside.to(torch.uint8)[:, None] * 255


def _in_heart(u: Tensor, v: Tensor) -> Tensor:
    return (u.square() + v.square() - 1).pow(3) <= u.square() * v.pow(3)
