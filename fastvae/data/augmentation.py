"""Random views of images, drawn for each image on the device of the batch.

Every one is a callable ``augment(x, generator=None)`` that returns a tensor of x's shape, dtype and device. x is
[B, C, H, W] or, with ``shape=(C, H, W)``, flat [B, C H W]: floating, uint8 or bool, the last two rounded. All numbers
that a call needs are drawn at once, [B, n], so that noise can be keyed by sample (``TracIn``).
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, overload

import torch
from torch import Tensor
from torch.nn import functional as F

from fastvae.arguments import expect, expect_not_negative, expect_numbers

__all__ = ["ColorJitter", "Compose", "RandomAffine", "RandomFlip", "accepts_generator"]

Shape = tuple[int, int, int]


def accepts_generator(augment: Callable[..., Any]) -> bool:
    """Whether a callable can be given ``generator=``."""
    return accepts(augment, "generator")


def accepts(augment: Callable[..., Any], name: str) -> bool:
    """Whether a callable has a parameter of this name that can be given by it."""
    try:
        parameters = inspect.signature(augment).parameters.values()
    except (TypeError, ValueError):  # of a builtin
        return False
    return any(p.name == name and p.kind != p.POSITIONAL_ONLY for p in parameters)


@dataclass(frozen=True)
class RandomAffine:
    """Rotation, translation and scaling of each image; what comes from outside the image is 0.

    The default numbers are those of Sinha and Dieng, "Consistency Regularization for Variational Auto-Encoders",
    NeurIPS 2021. Their code calls torchvision's RandomAffine as it comes: with interpolation="nearest", and shifts of
    whole pixels, which are fractions of a pixel here.

    Args:
        degrees: angles are uniform in [-degrees, degrees].
        translate: shifts are uniform in [-translate, translate], as parts of the height and of the width.
        scale: factors are uniform between these two.
        interpolation: "bilinear", or "nearest", which keeps binary images binary.
        shape: (C, H, W) of flat images.

    Raises:
        ValueError: an argument out of range; later, an x that is no batch of images.
    """

    degrees: float = 15.0
    translate: float = 0.05
    scale: tuple[float, float] = (0.9, 1.1)
    interpolation: str = "bilinear"
    shape: Shape | None = None

    def __post_init__(self) -> None:
        expect_not_negative("RandomAffine", degrees=self.degrees, translate=self.translate)
        low, high = self.scale
        expect(
            0 < low <= high < math.inf,
            "RandomAffine: scale: expected two numbers 0 < low <= high",
            self.scale,
        )
        expect(
            self.interpolation in ("bilinear", "nearest"),
            "RandomAffine: interpolation: expected 'bilinear' or 'nearest'",
            repr(self.interpolation),
        )

    def __call__(self, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """A view of each image, of x's shape and dtype."""
        return _changed(self, x, self.shape, lambda images, _: self._moved(images, generator))

    def _moved(self, images: Tensor, generator: torch.Generator | None) -> Tensor:
        height, width = images.shape[2:]
        angle, right, down, size = _uniform(images, 4, generator).unbind(1)
        angle = (2 * angle - 1) * math.radians(self.degrees)
        size = self.scale[0] + (self.scale[1] - self.scale[0]) * size
        # Shifts in units of half the image, as affine_grid has it.
        right, down = (2 * (2 * part - 1) * self.translate for part in (right, down))
        # From a place in the new image to the one it shows. Angles are of pixels, whatever the aspect ratio.
        cos, sin = torch.cos(angle) / size, torch.sin(angle) / size
        rows = (
            (cos, sin * (height / width)),
            (-sin * (width / height), cos),
        )
        theta = torch.stack([torch.stack([a, b, -a * right - b * down], 1) for a, b in rows], 1)
        # Autocast would round the grid to bfloat16: places, to half a pixel of a 64x64 image.
        with torch.autocast(images.device.type, enabled=False):
            grid = F.affine_grid(theta, list(images.shape), align_corners=False)
            moved = F.grid_sample(
                images, grid, mode=self.interpolation, padding_mode="zeros", align_corners=False
            )
        # The weights of an interpolation sum to 1 only up to rounding; likelihoods refuse 1.0000001.
        low, high = images.amin((1, 2, 3), keepdim=True), images.amax((1, 2, 3), keepdim=True)
        return torch.clamp(moved, low.clamp(max=0), high.clamp(min=0))


@dataclass(frozen=True)
class RandomFlip:
    """Mirror images: each left to right and upside down with these probabilities.

    Raises:
        ValueError: a probability outside [0, 1]; later, an x that is no batch of images.
    """

    horizontal: float = 0.5
    vertical: float = 0.0
    shape: Shape | None = None

    def __post_init__(self) -> None:
        expect_numbers("RandomFlip", horizontal=self.horizontal, vertical=self.vertical)
        for name, value in (("horizontal", self.horizontal), ("vertical", self.vertical)):
            expect(0 <= value <= 1, f"RandomFlip: {name}: expected a probability", value)

    @overload
    def __call__(self, x: Tensor, generator: torch.Generator | None = None) -> Tensor: ...

    @overload
    def __call__(
        self, x: Tensor, generator: torch.Generator | None = None, *, weight: Tensor
    ) -> tuple[Tensor, Tensor]: ...

    def __call__(
        self, x: Tensor, generator: torch.Generator | None = None, *, weight: Tensor | None = None
    ) -> Tensor | tuple[Tensor, Tensor]:
        """A view of each image, of x's shape and dtype; with weights of x's elements (of x's shape) the pair of it and
        its own.
        """
        drawn = []

        def flip(images: Tensor, _: float) -> Tensor:
            drawn.append(_uniform(images, 2, generator))
            return self._flipped(images, drawn[0])

        view = _changed(self, x, self.shape, flip)
        if weight is None:
            return view
        shaped = weight if self.shape is None else weight.reshape(len(weight), *self.shape)
        return view, self._flipped(shaped, drawn[0]).reshape(weight.shape) if drawn else weight

    def _flipped(self, images: Tensor, drawn: Tensor) -> Tensor:
        for index, (axis, probability) in enumerate(((3, self.horizontal), (2, self.vertical))):
            chosen = (drawn[:, index] < probability)[:, None, None, None]
            images = torch.where(chosen, images.flip(axis), images)
        return images


@dataclass(frozen=True)
class ColorJitter:
    """Brightness, contrast and saturation of each colour image, changed by factors in [1 - a, 1 + a].

    Brightness multiplies; contrast moves values away from or towards the image's mean grey; saturation, from or
    towards each pixel's grey (0.299 R + 0.587 G + 0.114 B). In this order; the result is clamped to [0, 1] (uint8:
    0 to 255).

    Raises:
        ValueError: an a outside [0, 1]; later, an x that is no batch of images [B, 3, H, W].
    """

    brightness: float = 0.2
    contrast: float = 0.2
    saturation: float = 0.2
    shape: Shape | None = None

    def __post_init__(self) -> None:
        expect_numbers("ColorJitter", brightness=self.brightness, contrast=self.contrast)
        expect_numbers("ColorJitter", saturation=self.saturation)
        for name in ("brightness", "contrast", "saturation"):
            expect(
                0 <= getattr(self, name) <= 1,
                f"ColorJitter: {name}: expected a number in [0, 1]",
                getattr(self, name),
            )

    def __call__(self, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """A view of each image, of x's shape and dtype."""
        return _changed(self, x, self.shape, lambda images, top: self._jittered(images, top, generator))

    def _jittered(self, images: Tensor, top: float, generator: torch.Generator | None) -> Tensor:
        expect(images.shape[1] == 3, "ColorJitter: x: expected images of 3 channels", images.shape[1])
        drawn = (2 * _uniform(images, 3, generator) - 1)[:, :, None, None, None].unbind(1)
        reach = self.brightness, self.contrast, self.saturation
        brightness, contrast, saturation = (1 + part * a for part, a in zip(drawn, reach, strict=True))
        images = images * brightness
        images = torch.lerp(_grey(images).mean((2, 3), keepdim=True).expand_as(images), images, contrast)
        return torch.lerp(_grey(images).expand_as(images), images, saturation).clamp(0, top)


class Compose:
    """One augmentation after the other; those that take ``generator=`` are given it."""

    def __init__(self, *augments: Callable[..., Tensor]) -> None:
        self.augments = augments
        self._takes_generator = [accepts_generator(augment) for augment in augments]

    def __call__(self, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """What the last one makes."""
        for augment, takes in zip(self.augments, self._takes_generator, strict=True):
            x = augment(x, generator=generator) if takes else augment(x)
        return x

    def __repr__(self) -> str:
        return f"Compose({', '.join(map(repr, self.augments))})"


def _grey(images: Tensor) -> Tensor:
    red, green, blue = images.split(1, 1)
    return 0.299 * red + 0.587 * green + 0.114 * blue


def _uniform(images: Tensor, count: int, generator: torch.Generator | None) -> Tensor:
    """[B, count] in [0, 1), drawn on the generator's device."""
    device = images.device if generator is None else generator.device
    drawn = torch.rand(len(images), count, generator=generator, device=device, dtype=images.dtype)
    return drawn.to(images.device)


def _changed(
    augment: object, x: Tensor, shape: Sequence[int] | None, change: Callable[[Tensor, float], Tensor]
) -> Tensor:
    """``change(images [B, C, H, W], largest value)``, in x's shape and dtype."""
    name = type(augment).__name__
    expect(
        x.is_floating_point() or x.dtype in (torch.uint8, torch.bool),
        f"{name}: x: expected floating, uint8 or bool images",
        x.dtype,
    )
    if shape is None and x.dim() != 4:
        raise ValueError(
            f"{name}: x: expected images [B, C, H, W], got {list(x.shape)}; for flat images pass shape=(C, H, W)"
        )
    if shape is not None and (len(shape) != 3 or x.dim() == 0 or x[:1].numel() not in (0, math.prod(shape))):
        raise ValueError(f"{name}: x: expected images of shape {tuple(shape)}, got {list(x.shape)}")
    if x.numel() == 0:
        return x
    dtype = torch.promote_types(x.dtype, torch.float32) if x.is_floating_point() else torch.float32
    images = (x if shape is None else x.reshape(len(x), *shape)).to(dtype)
    found = change(images, 255.0 if x.dtype == torch.uint8 else 1.0).reshape(x.shape)
    if x.dtype == torch.bool:
        return found >= 0.5
    return found.round().to(x.dtype) if x.dtype == torch.uint8 else found.to(x.dtype)
