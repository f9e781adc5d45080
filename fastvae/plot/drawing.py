"""Sizes, colours and axes that all figures share.

A figure is 4.8 inches wide: on a phone, 360 CSS pixels, a point is then about a pixel, so that no text is below 9.
"""

from __future__ import annotations

import io

from fastvae._distribution import to_mend

try:
    from matplotlib.axes import Axes
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator
except ImportError as error:
    raise ImportError(f"fastvae.plot: needs matplotlib; {to_mend('matplotlib', 'demo')}") from error

__all__ = ["COLOURS", "FONT", "GRID", "INK", "MUTED", "WIDTH", "empty_figure", "panels", "plain_axes", "png"]

WIDTH = 4.8
"""Inches."""
FONT = 9
"""Points."""
INK, MUTED, GRID = "#334155", "#64748b", "#e2e8f0"
COLOURS = (
    MUTED,
    "#c2410c",
    "#0e7490",
    "#a16207",
    "#7e22ce",
    "#15803d",
    "#be123c",
    "#1d4ed8",
    "#57534e",
    "#0f766e",
)
"""Of the series of a figure; the first is what others are compared with."""


class NotebookFigure(Figure):
    """A figure that a notebook shows by itself; those that pyplot did not make it shows once pyplot was imported."""

    def _repr_png_(self) -> tuple[bytes, dict[str, int]]:
        return png(self), {"width": 480}  # CSS pixels, half of those in the picture


def empty_figure(height: float, *, constrained: bool = True) -> Figure:
    """A white figure of that height in inches, with a canvas that needs no display."""
    figure = NotebookFigure(figsize=(WIDTH, height), layout="constrained" if constrained else None, dpi=200)
    FigureCanvasAgg(figure)
    return figure


def panels(rows: int, columns: int, height: float, below: float = 0.0) -> tuple[Figure, list[list[Axes]]]:
    """A figure of ``rows`` times ``columns`` plain axes: inches of each row, and ``below`` them for a legend."""
    figure = empty_figure(rows * height + below)
    grid = figure.subplots(rows, columns, squeeze=False)
    for axis in grid.flat:
        plain_axes(axis)
    return figure, [list(row) for row in grid]


def plain_axes(axis: Axes) -> None:
    """Two spines, a light grid behind what is drawn, few ticks."""
    axis.spines[["top", "right"]].set_visible(False)
    axis.spines[["left", "bottom"]].set_color(INK)
    axis.tick_params(colors=INK, labelsize=FONT)
    axis.grid(color=GRID, linewidth=0.8)
    axis.set_axisbelow(True)
    axis.xaxis.set_major_locator(MaxNLocator(4))
    axis.yaxis.set_major_locator(MaxNLocator(5))
    for text in (axis.xaxis.label, axis.yaxis.label):
        text.set(color=INK, size=FONT)


def png(figure: Figure) -> bytes:
    """The figure as a PNG, 960 pixels wide."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=200)
    return buffer.getvalue()
