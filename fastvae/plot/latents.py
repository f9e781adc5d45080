"""What single latents do to an image, and where codes lie."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator
from torch import Tensor
from torch.nn import functional as F

from fastvae.arguments import expect, expect_integers, expect_positive, given
from fastvae.metrics.posteriors import divergence_by_latent, private_model
from fastvae.models import BaseVAE
from fastvae.plot.drawing import COLOURS, FONT, INK, MUTED, WIDTH, empty_figure, panels
from fastvae.plot.images import as_images, as_tensor, draw_image

__all__ = ["chosen_latents", "jacobian_columns", "latent_scatter", "traversals"]

_LEGEND = 10
"""Labels that a legend names; more get a bar of colours."""


def traversals(
    model: BaseVAE,
    x: Tensor,
    *,
    latents: int | Sequence[int] = 5,
    columns: int = 8,
    span: float = 2.5,
    condition: Tensor | None = None,
) -> Figure:
    """The first image of x as its mean code moves from -span to span along one latent, a line for each latent.

    Args:
        model: a fastvae model.
        x: [N, C, H, W]; all of it decides which latents say most, of which there are ``latents`` lines, those of the
            largest KL(q(z_i | x) || N(0, 1)) first. Their numbers may be given instead.
        columns: values of a latent.
        span: the largest of them.
        condition: [N, ...] of a conditional model.

    Raises:
        ValueError: no images, latents that the model does not have, or a span that is not finite.
    """
    expect_integers("plot.traversals", 1, columns=columns)
    expect_positive("plot.traversals", span=span)
    private = private_model("plot.traversals", model)
    chosen = chosen_latents("plot.traversals", private, x, latents, condition)
    first = None if condition is None else condition[:1]
    values = torch.linspace(-span, span, columns, device="cpu")
    with torch.no_grad():
        z = private.encode(x[:1], **given(condition=first))[0].repeat(len(chosen) * columns, 1)
        column = torch.tensor(chosen, device=z.device).repeat_interleave(columns)
        z[torch.arange(len(z), device=z.device), column] = values.repeat(len(chosen)).to(z)
        repeated = None if first is None else first.repeat(len(z), *[1] * (first.dim() - 1))
        made = private.likelihood.mean(private.decode(z, **given(condition=repeated)))
    images = as_images("plot.traversals", made, x.shape[1:])
    ticks = [f"{value:.1f}" for value in values.tolist()]
    return _lines(images, [f"z{index}" for index in chosen], ticks, "value of the latent")


def jacobian_columns(
    model: BaseVAE, x: Tensor, *, latents: int | Sequence[int] = 8, largest: float | None = None
) -> Figure:
    """What a small step along each latent adds to each pixel (red) or takes from it (blue), a line for each x.

    The columns of dy/dz at the mean code of x, y the mean of p(x | z).

    Args:
        model: a fastvae model.
        x: [N, C, H, W], a line each; which latents: see :func:`traversals`.
        latents: how many, or which.
        largest: the entry at which colours are full; None: the largest of all that are shown.

    Raises:
        ValueError: no images, latents that the model does not have, or a ``largest`` that is not above 0.
    """
    if largest is not None:
        expect_positive("plot.jacobian_columns", largest=largest)
    private = private_model("plot.jacobian_columns", model)
    chosen = chosen_latents("plot.jacobian_columns", private, x, latents)
    with torch.no_grad():
        z = private.encode(x)[0]

        def mean_of(point: Tensor) -> Tensor:
            return private.likelihood.mean(private.decode(point))

        directions = F.one_hot(torch.tensor(chosen, device=z.device), z.shape[1]).to(z)
        found = [torch.func.jvp(mean_of, (z,), (direction.expand_as(z),))[1] for direction in directions]
    slopes = as_images("plot.jacobian_columns", torch.stack(found, 1).flatten(0, 1), x.shape[1:])
    full = float(slopes.mean(1).abs().max()) if largest is None else largest
    names = [f"image {number}" for number in range(1, len(x) + 1)]
    return _lines(signed_colours(slopes, max(full, 1e-12)), names, [f"z{i}" for i in chosen], "latent")


def latent_scatter(
    codes: BaseVAE | Tensor,
    x: Tensor | None = None,
    labels: Tensor | None = None,
    *,
    latents: Sequence[int] | None = None,
    condition: Tensor | None = None,
) -> Figure:
    """Two latents of many codes against each other, coloured by label.

    Args:
        codes: codes [N, d], or a fastvae model, which gives the means of q(z | x).
        x: [N, ...] where a model is given.
        labels: integers [N], or None.
        latents: which two; None: those of a model that say most (see :func:`traversals`), the first two of codes. Of
            a single latent the codes are drawn against their rank.
        condition: [N, ...] of a conditional model.

    Raises:
        ValueError: shapes that do not fit.
    """
    if isinstance(codes, Tensor):
        chosen = list(latents) if latents is not None else [0, 1]
    else:
        if x is None:
            raise ValueError("plot.latent_scatter: x: expected samples for the model to encode, got None")
        private = private_model("plot.latent_scatter", codes)
        chosen = chosen_latents(
            "plot.latent_scatter", private, x, 2 if latents is None else latents, condition
        )
        with torch.no_grad():
            codes = private.encode(x, **given(condition=condition))[0]
    points = codes.detach().cpu().double()
    if labels is not None:
        labels = as_tensor("plot.latent_scatter", "labels", labels)
    if points.dim() != 2 or 0 in points.shape or (labels is not None and labels.shape != points.shape[:1]):
        of_labels = "" if labels is None else f", labels {list(labels.shape)}"
        raise ValueError(
            f"plot.latent_scatter: expected codes [N, d] and labels [N], got {list(points.shape)}{of_labels}"
        )
    chosen = [index for index in chosen if index < points.shape[1]][:2]
    at = points[:, chosen]
    if not bool(at.isfinite().all()):
        bad = int((~at.isfinite().all(1)).sum())
        raise ValueError(f"plot.latent_scatter: expected finite codes, got {bad} of {len(at)} that are not")
    if len(chosen) == 1:
        at = torch.stack((at[:, 0], at[:, 0].argsort().argsort().double()), 1)
    figure, ((axis,),) = panels(1, 1, 3.6)
    axis.set(xlabel=f"z{chosen[0]}", ylabel=f"z{chosen[1]}" if len(chosen) == 2 else "rank")
    kinds = [] if labels is None else labels.unique().tolist()
    dots: dict[str, Any] = {"s": 9 if len(at) > 300 else 16, "alpha": 0.75, "linewidths": 0}
    if labels is None:
        axis.scatter(*at.T, color=COLOURS[1], **dots)
    elif len(kinds) <= _LEGEND:
        for kind, colour in zip(kinds, COLOURS[1:] + COLOURS[:1], strict=False):
            axis.scatter(*at[labels.cpu() == kind].T, color=colour, label=str(kind), **dots)
        figure.legend(
            loc="outside lower center", ncols=min(len(kinds), 5), frameon=False, fontsize=FONT, title="label",
            title_fontsize=FONT, markerscale=2, handletextpad=0.1, columnspacing=1.0,
        )  # fmt: skip
    else:
        shown = axis.scatter(*at.T, **dots, c=labels.cpu().numpy(), cmap="turbo")  # type: ignore[misc]
        bar = figure.colorbar(shown, ax=axis)
        bar.ax.tick_params(labelsize=FONT, colors=INK)
        bar.set_label("label", size=FONT, color=INK)
    return figure


def signed_colours(images: Tensor, largest: float) -> Tensor:
    """Images of any sign as colours [N, 3, H, W]: white at 0, red at ``largest``, blue at minus that.

    Args:
        images: [N, C, H, W]; the mean over channels is shown.
        largest: above 0; beyond it colours do not change.
    """
    shade = (images.mean(1) / largest).clamp(-1, 1)
    return torch.stack([1 + shade.clamp(max=0), 1 - shade.abs(), 1 - shade.clamp(min=0)], 1)


def chosen_latents(
    owner: str,
    model: BaseVAE,
    x: Tensor,
    latents: int | Sequence[int],
    condition: Tensor | None = None,
) -> list[int]:
    """Which latents: those given, or so many that say most of x; ValueError, in the owner's name, for others."""
    expect(len(x) > 0, f"{owner}: x: expected at least one image", "none")
    if isinstance(latents, int):
        expect_integers(owner, 1, latents=latents)
        batches, place = (x, None) if condition is None else ([(x, condition)], 1)
        return (
            divergence_by_latent(model, batches, condition=place).argsort(descending=True)[:latents].tolist()
        )
    known = model.latent_dim or 0
    expect(
        bool(latents) and all(0 <= index < known for index in latents),
        f"{owner}: latents: expected numbers from 0 to {known - 1}",
        list(latents),
    )
    return list(latents)


def _lines(images: Tensor, names: list[str], ticks: list[str], label: str) -> Figure:
    """Images [len(names) * len(ticks), C, H, W], a line for each name, with ticks at the left and below."""
    columns, lines = len(ticks), len(names)
    # Inches: room at the left for the longest name, below for the ticks and their label.
    left = 0.14 + 0.085 * max(map(len, names))
    cell = (WIDTH - left - 0.06) / columns
    height = min(cell * images.shape[2] / images.shape[3], 1.2)
    below = 0.52
    figure = empty_figure(0.06 + lines * height + below, constrained=False)
    whole = figure.get_figheight()
    axis = figure.add_axes(
        (left / WIDTH, below / whole, columns * cell / WIDTH, lines * height / whole), frameon=False
    )
    for index, image in enumerate(images):
        row, column = divmod(index, columns)
        draw_image(axis, image, column * cell, row * height, 0.94 * cell, 0.94 * height)
    axis.set(xlim=(0, columns * cell), ylim=(lines * height, 0))
    axis.xaxis.set_major_locator(FixedLocator([(index + 0.47) * cell for index in range(columns)]))
    axis.yaxis.set_major_locator(FixedLocator([(index + 0.47) * height for index in range(lines)]))
    axis.set_xticklabels(ticks)
    axis.set_yticklabels(names)
    axis.tick_params(length=0, labelsize=FONT, colors=INK)
    axis.set_xlabel(label, size=FONT, color=MUTED)
    return figure
