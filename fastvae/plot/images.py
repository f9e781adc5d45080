"""Images in named blocks, with or without a caption under each."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor

from fastvae.arguments import expect, expect_integers
from fastvae.plot.drawing import FONT, GRID, INK, WIDTH, empty_figure

__all__ = ["as_images", "as_tensor", "captioned_rows", "draw_image", "image_blocks"]

_MARGIN, _NAME, _CAPTION, _GAP = 0.06, 0.26, 0.17, 0.06
"""Inches."""
_TALLEST = 1.2
"""Inches of an image at most, for those that are much higher than wide."""


def image_blocks(
    blocks: Mapping[str, Tensor], *, columns: int = 8, captions: Mapping[str, Sequence[str]] | None = None
) -> Figure:
    """Blocks of images one under the other, each with its name above it.

    Args:
        blocks: by name, images [N, C, H, W] as uint8 or with values in [0, 1] (beyond them they are clipped), C = 1 or
            3; of other C the mean over channels is shown. Blocks may differ in N, and in the size of their images.
        columns: images side by side; those beyond go to further lines.
        captions: by name of a block, a few characters for each of its images, written below it.

    Raises:
        ValueError: images of another rank, no images, or captions that are not one an image.
    """
    captions = {} if captions is None else captions
    expect_integers("plot.image_blocks", 1, columns=columns)
    expect(bool(blocks), "plot.image_blocks: blocks: expected at least one", "none")
    if unknown := captions.keys() - blocks.keys():
        raise ValueError(f"plot.image_blocks: captions: expected names of blocks, got {sorted(unknown)}")
    blocks = {name: as_images("plot.image_blocks", images, None) for name, images in blocks.items()}
    heights = []
    for name, images in blocks.items():
        given = len(captions.get(name, images))
        expect(
            given == len(images), f"plot.image_blocks: captions: expected {len(images)} for {name!r}", given
        )
        lines = math.ceil(len(images) / columns)
        heights.append(_NAME + lines * _line_height(images, columns, name in captions))
    figure = empty_figure(sum(heights) + _MARGIN, constrained=False)
    axis = _in_inches(figure)
    top = 0.0
    for (name, images), height in zip(blocks.items(), heights, strict=True):
        axis.text(_MARGIN, top + _NAME / 2, name, size=FONT, color=INK, va="center")
        _draw_block(axis, images, columns, top + _NAME, captions.get(name))
        top += height
    return figure


def as_tensor(owner: str, argument: str, values: Any) -> Tensor:
    """A tensor as it is; numbers in an array or a list as one. TypeError for anything else."""
    try:
        return values if isinstance(values, Tensor) else torch.as_tensor(values, device="cpu")
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(
            f"{owner}: {argument}: expected a tensor or an array of numbers, got {type(values).__name__} ({error})"
        ) from error


def as_images(owner: str, values: Any, shape: Sequence[int] | None) -> Tensor:
    """Values [N, ...] as images [N, C, H, W], of ``shape`` [C, H, W] if given; ValueError where they are none.

    Bytes come back as their share of 255.
    """
    values = as_tensor(owner, "images", values)
    expect(len(values) > 0, f"{owner}: expected images [N, C, H, W], not empty", list(values.shape))
    if shape is not None:
        expect(
            len(shape) == 3 and values[0].numel() == math.prod(shape),
            f"{owner}: shape: expected [C, H, W] of {values[0].numel()} values",
            list(shape),
        )
        values = values.reshape(-1, *shape)
    if values.dim() != 4 or 0 in values.shape:
        raise ValueError(
            f"{owner}: expected images [N, C, H, W], not empty, got {list(values.shape)}; shape=[C, H, W] lays out "
            "what a model returns flat"
        )
    values = values.detach().cpu()
    return values.float() / 255 if values.dtype == torch.uint8 else values


def captioned_rows(
    rows: Sequence[tuple[Tensor, Sequence[str]]], *, headings: Sequence[tuple[int, str]]
) -> Figure:
    """Rows of as many images, a caption under each, and headings over the columns at which they start.

    Args:
        rows: images [N, C, H, W] and N captions each.
        headings: (column, text); a heading may reach to the next one's column.
    """
    columns = len(rows[0][0])
    height = _line_height(rows[0][0], columns, captioned=True)
    figure = empty_figure(_NAME + len(rows) * height + _MARGIN, constrained=False)
    axis = _in_inches(figure)
    cell = (WIDTH - 2 * _MARGIN) / columns
    for column, text in headings:
        axis.text(_MARGIN + column * cell, _NAME / 2, text, size=FONT, color=INK, va="center")
    for index, (images, captions) in enumerate(rows):
        _draw_block(axis, images, columns, _NAME + index * height, captions)
    return figure


def draw_image(axis: Axes, image: Tensor, left: float, top: float, width: float, height: float) -> None:
    """One image [C, H, W] into a place of axes whose y grows downwards; its pixels are not blurred."""
    if image.shape[0] not in (1, 3):
        image = image.mean(0, keepdim=True)
    pixels: np.ndarray = image.detach().cpu().float().clamp(0, 1).permute(1, 2, 0).numpy()
    axis.imshow(
        pixels[:, :, 0] if pixels.shape[2] == 1 else pixels,
        cmap="gray",
        vmin=0,
        vmax=1,
        interpolation="nearest",
        extent=(left, left + width, top + height, top),
        aspect="auto",
    )
    # White images end somewhere, too.
    axis.add_patch(Rectangle((left, top), width, height, fill=False, edgecolor=GRID, linewidth=0.5))


def _draw_block(axis: Axes, images: Tensor, columns: int, top: float, captions: Sequence[str] | None) -> None:
    cell = (WIDTH - 2 * _MARGIN) / columns
    line = _line_height(images, columns, captions is not None)
    height = line - _GAP - (0 if captions is None else _CAPTION)
    width = min(cell - _GAP, height * images.shape[3] / images.shape[2])
    for index, image in enumerate(images):
        row, column = divmod(index, columns)
        left, upper = _MARGIN + column * cell, top + row * line
        draw_image(axis, image, left + (cell - _GAP - width) / 2, upper, width, height)
        if captions is not None:
            middle = left + (cell - _GAP) / 2
            axis.text(
                middle, upper + height + 0.02, captions[index], size=FONT, color=INK, ha="center", va="top"
            )
    _whole(axis)


def _line_height(images: Tensor, columns: int, captioned: bool) -> float:
    width = (WIDTH - 2 * _MARGIN) / columns - _GAP
    height = min(width * images.shape[2] / images.shape[3], _TALLEST)
    return height + _GAP + (_CAPTION if captioned else 0)


def _in_inches(figure: Figure) -> Axes:
    """Axes over all of the figure, in inches from its upper left corner."""
    axis = figure.add_axes((0, 0, 1, 1))
    axis.set_axis_off()
    _whole(axis)
    return axis


def _whole(axis: Axes) -> None:
    # imshow sets limits of its own.
    axis.set(xlim=(0, WIDTH), ylim=(axis.figure.get_figheight(), 0))  # type: ignore[union-attr]
