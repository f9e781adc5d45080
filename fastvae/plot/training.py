"""Losses against steps and time."""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import accumulate, cycle

from matplotlib.figure import Figure

from fastvae.arguments import expect
from fastvae.plot.drawing import COLOURS, FONT, panels
from fastvae.training import History

__all__ = ["training_curves"]


def training_curves(histories: History | Mapping[str, History]) -> Figure:
    """Losses after every epoch, against optimisation steps and against seconds: held out (thick) and training (thin).

    The first twentieth of the epochs, which would flatten the rest, may lie above the figure.

    Args:
        histories: of :func:`fastvae.fit`, one, or several by name.

    Raises:
        ValueError: none, or one without an epoch.
    """
    named = {"": histories} if isinstance(histories, History) else dict(histories)
    expect(
        bool(named) and all(history.steps for history in named.values()),
        "plot.training_curves: histories: expected at least one epoch of each",
        "none",
    )
    figure, (row,) = panels(1, 2, 2.5)
    lowest, highest = math.inf, -math.inf
    for (name, history), colour in zip(named.items(), cycle(COLOURS[1:] + COLOURS[:1]), strict=False):
        held_out = [math.nan if value is None else value for value in history.val_loss]
        # A single epoch is a point.
        mark = "o" if len(held_out) == 1 else None
        times: list[list[float]] = [[*history.steps], list(accumulate(history.seconds))]
        for axis, at in zip(row, times, strict=True):
            axis.plot(at, history.train_loss, color=colour, linewidth=0.8, alpha=0.5, marker=mark)
            axis.plot(at, held_out, color=colour, linewidth=1.8, marker=mark, label=name)
        late = slice(len(held_out) // 20, None)
        shown = [value for value in (*history.train_loss[late], *held_out[late]) if math.isfinite(value)]
        lowest, highest = min([lowest, *shown]), max([highest, *shown])
    row[0].set(xlabel="optimisation steps", ylabel="loss, nats")
    row[1].set(xlabel="seconds of training")
    if math.isfinite(lowest):
        room = 0.05 * (highest - lowest) or 1.0
        for axis in row:
            axis.set_ylim(lowest - room, highest + room)
    if any(named):
        figure.legend(
            *row[0].get_legend_handles_labels(),
            loc="outside lower center",
            ncols=3,
            frameon=False,
            fontsize=FONT,
        )
    return figure
