"""Rows of numbers: columns of samples beside those of data, values beside their reconstructions, effects of latents."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from fastvae.arguments import expect, expect_integers, expect_positive, given
from fastvae.metrics.posteriors import private_model
from fastvae.models import BaseVAE
from fastvae.plot.drawing import COLOURS, FONT, INK, MUTED, empty_figure, panels, plain_axes
from fastvae.plot.latents import chosen_latents

__all__ = ["column_effects", "column_moments", "reconstructed_values"]

_POINTS = 3000
"""Points of a scatter at most, evenly spread."""
_LETTERS = 14
"""Of a column's name."""


def column_moments(data: Tensor, samples: Tensor) -> Figure:
    """Mean and standard deviation of each column, of samples against data: a point a column, on the line if they agree.

    Args:
        data: [N, F], N at least 2.
        samples: [M, F], M at least 2.

    Raises:
        ValueError: shapes that do not fit, or values that are not finite.
    """
    both = [_rows("plot.column_moments", each, 2) for each in (data, samples)]
    expect(
        both[0].shape[1] == both[1].shape[1],
        "plot.column_moments: samples: expected as many columns as data",
        f"{both[1].shape[1]} and {both[0].shape[1]}",
    )
    figure, (row,) = panels(1, 2, 2.5)
    for axis, name, of in zip(row, ("means", "standard deviations"), (_mean, _deviation), strict=True):
        axis.set_title(name, size=FONT)
        _against(axis, *(of(each) for each in both))
        axis.set(xlabel="data", ylabel="samples")
    return figure


def reconstructed_values(x: Tensor, made: Tensor) -> Figure:
    """Every number of some rows against its reconstruction; on the line where they agree.

    Args:
        x: [N, F].
        made: [N, F], the mean of p(x | z), say.

    Raises:
        ValueError: shapes that do not fit, or values that are not finite.
    """
    both = [_rows("plot.reconstructed_values", each, 1) for each in (x, made)]
    expect(
        both[0].shape == both[1].shape,
        "plot.reconstructed_values: made: expected the shape of x",
        f"{list(both[1].shape)} and {list(both[0].shape)}",
    )
    flat = [each.flatten() for each in both]
    chosen = torch.linspace(0, len(flat[0]) - 1, min(_POINTS, len(flat[0])), device="cpu").long()
    figure, ((axis,),) = panels(1, 1, 3.2)
    _against(axis, *(each[chosen] for each in flat))
    axis.set(xlabel="value", ylabel="reconstruction")
    return figure


def column_effects(
    model: BaseVAE,
    x: Tensor,
    names: Sequence[str] | None = None,
    *,
    condition: Tensor | None = None,
    latents: int | Sequence[int] = 6,
    columns: int = 10,
    span: float = 2.5,
) -> Figure:
    """How far the mean of each column moves as one latent goes from -span to span, from the first row's mean code.

    In standard deviations of the column over x; shown are the columns that move most.

    Args:
        model: a fastvae model of rows.
        x: [N, F] as the model takes it, N at least 2; all of it decides which latents say most.
        names: of the F columns; None: their numbers.
        condition: [N, ...] of a conditional model.
        latents: how many, or which, as of :func:`fastvae.plot.traversals`.
        columns: how many columns.
        span: how far a latent goes.

    Raises:
        ValueError: no rows, names that are not one a column, latents that the model does not have.
    """
    expect_integers("plot.column_effects", 1, columns=columns)
    expect_positive("plot.column_effects", span=span)
    spread = _deviation(_rows("plot.column_effects", x, 2)).clamp_min(1e-12)
    names = list(map(str, range(x.shape[1]))) if names is None else list(names)
    expect(len(names) == x.shape[1], f"plot.column_effects: names: expected {x.shape[1]}", len(names))
    private = private_model("plot.column_effects", model)
    chosen = chosen_latents("plot.column_effects", private, x, latents, condition)
    first = None if condition is None else condition[:1]
    with torch.no_grad():
        z = private.encode(x[:1], **given(condition=first))[0].repeat(2 * len(chosen), 1)
        for row, latent in enumerate(chosen):
            z[2 * row, latent], z[2 * row + 1, latent] = -span, span
        besides = {} if first is None else {"condition": first.repeat(len(z), *[1] * (first.dim() - 1))}
        made = private.likelihood.mean(private.decode(z, **besides)).reshape(len(z), -1).double().cpu()
    change = (made[1::2] - made[::2]) / spread
    order = change.abs().amax(0).argsort(descending=True)[:columns]
    shown = change[:, order].T
    figure = empty_figure(max(1.8, 0.75 + 0.24 * len(order)))
    axis = figure.add_subplot()
    plain_axes(axis)
    axis.grid(visible=False)
    most = float(shown.abs().max()) or 1.0
    image = axis.imshow(shown.numpy(), cmap="RdBu_r", vmin=-most, vmax=most, aspect="auto")
    axis.set_xticks(range(len(chosen)), [f"z{latent}" for latent in chosen])
    axis.set_yticks(range(len(order)), [_short(names[index]) for index in order.tolist()])
    axis.tick_params(length=0)
    bar = figure.colorbar(image, ax=axis)
    bar.ax.tick_params(labelsize=FONT, colors=INK)
    bar.set_label("standard deviations", size=FONT, color=MUTED)
    return figure


def _against(axis: Axes, at: Tensor, other: Tensor) -> None:
    """A scatter with the line of equal values; in powers of ten where values are positive and far apart."""
    both = torch.cat((at, other))
    low, high = float(both.min()), float(both.max())
    positive = both[both > 0]
    if low >= 0 and len(positive) and high > 100 * float(positive.median()) > 0:
        scale: dict[str, Any] = {"linthresh": 1.0}
        axis.set_xscale("symlog", **scale)
        axis.set_yscale("symlog", **scale)
    axis.plot([low, high], [low, high], color=MUTED, linewidth=0.8)
    axis.scatter(at.numpy(), other.numpy(), color=COLOURS[1], s=9, alpha=0.5, linewidths=0)


def _rows(owner: str, values: Tensor, least: int) -> Tensor:
    fits = values.dim() == 2 and len(values) >= least and values.shape[1] >= 1
    expect(fits, f"{owner}: expected at least {least} rows [N, F]", list(values.shape))
    found = values.detach().double().cpu()
    bad = int((~found.isfinite()).sum())
    expect(not bad, f"{owner}: expected finite values", f"{bad} of {found.numel()} that are not")
    return found


def _mean(values: Tensor) -> Tensor:
    return values.mean(0)


def _deviation(values: Tensor) -> Tensor:
    return values.std(0)


def _short(name: str) -> str:
    return name if len(name) <= _LETTERS else f"{name[: _LETTERS - 1]}…"
