"""What a model makes up, and what it makes of data."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from matplotlib.figure import Figure
from torch import Tensor

from fastvae.arguments import expect, expect_integers
from fastvae.metrics.posteriors import private_model
from fastvae.models import BaseVAE
from fastvae.plot.images import as_images, image_blocks

__all__ = ["reconstructions", "samples"]


def samples(
    model: BaseVAE | Tensor,
    data: Tensor | None = None,
    *,
    count: int = 32,
    columns: int = 8,
    shape: Sequence[int] | None = None,
    seed: int = 0,
) -> Figure:
    """Images that a model makes up: the mean of p(x | z) for z of the prior, not selected; above them data, if given.

    Args:
        model: a fastvae model, or images [N, C, H, W] that were sampled elsewhere.
        data: [N, C, H, W] to compare with, of which ``count`` at most are shown.
        count: samples.
        columns: images side by side.
        shape: [C, H, W] of an image where the decoder returns another layout; None: that of the data, if given.
        seed: of the codes.

    Raises:
        ValueError: what is sampled are no images, in that shape.
        TypeError: neither a model nor a tensor.
    """
    expect_integers("plot.samples", 1, count=count, columns=columns)
    if data is not None:
        data = as_images("plot.samples", data, shape)
        shape = data.shape[1:]
    if not isinstance(model, Tensor):
        model = private_model("plot.samples", model).sample(
            count, generator=torch.Generator().manual_seed(seed)
        )
    blocks = {} if data is None else {"data": data[:count]}
    blocks["samples"] = as_images("plot.samples", model, shape)
    return image_blocks(blocks, columns=columns)


def reconstructions(model: BaseVAE | Tensor, x: Tensor, *, columns: int = 8, seed: int = 0) -> Figure:
    """Images, and under each the mean of p(x | z) for one code z of its approximate posterior.

    Args:
        model: a fastvae model, or reconstructions of x that were made elsewhere.
        x: [N, C, H, W] as the model takes it.
        columns: images side by side.
        seed: of the codes.

    Raises:
        ValueError: x are no images.
        TypeError: neither a model nor a tensor.
    """
    expect_integers("plot.reconstructions", 1, columns=columns)
    originals = as_images("plot.reconstructions", x, None)
    shape = originals.shape[1:]
    if not isinstance(model, Tensor):
        private = private_model("plot.reconstructions", model)
        model = private.reconstruct(x, generator=torch.Generator().manual_seed(seed))
    made = as_images("plot.reconstructions", model, shape)
    expect(
        len(made) == len(originals),
        f"plot.reconstructions: model: expected a reconstruction of each image, {len(originals)}",
        len(made),
    )
    pairs: list[Tensor] = []
    for start in range(0, len(x), columns):
        upper, lower = (each[start : start + columns] for each in (originals, made))
        blank = upper.new_ones(columns - len(upper), *shape) if start else upper[:0]
        pairs += [upper, blank, lower, blank]
    name = "images, and below each its reconstruction"
    return image_blocks({name: torch.cat(pairs)}, columns=min(columns, len(x)))
