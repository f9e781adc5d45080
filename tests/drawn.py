"""What a figure shows, as its renderer lays it out."""

from __future__ import annotations

from itertools import combinations

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text

__all__ = ["check_readable", "shown_images", "shown_words"]

# At 360 CSS pixels of width a point is 0.075 of an inch's 72nd: 8.5 points are 8.9 pixels at least.
_SMALLEST, _WIDEST = 8.5, 4.8


def check_readable(figure: Figure) -> None:
    """No text is clipped, covers another or is too small for a phone."""
    assert isinstance(figure.canvas, FigureCanvasAgg) and figure.get_figwidth() <= _WIDEST
    boxes = {text: text.get_window_extent() for text in _shown_texts(figure)}
    whole = figure.bbox
    for text, box in boxes.items():
        said = text.get_text()
        assert text.get_fontsize() >= _SMALLEST, said
        # Half a pixel of rounding.
        assert whole.x0 - 0.5 <= box.x0 and box.x1 <= whole.x1 + 0.5, f"{said!r} is cut off at a side"
        assert whole.y0 - 0.5 <= box.y0 and box.y1 <= whole.y1 + 0.5, f"{said!r} is cut off above or below"
    for (first, one), (second, other) in combinations(boxes.items(), 2):
        width = min(one.x1, other.x1) - max(one.x0, other.x0)
        height = min(one.y1, other.y1) - max(one.y0, other.y0)
        assert min(width, height) <= 1, f"{first.get_text()!r} covers {second.get_text()!r}"


def shown_words(figure: Figure) -> list[str]:
    """All text that is drawn."""
    return [text.get_text() for text in _shown_texts(figure)]


def shown_images(figure: Figure) -> int:
    """How many pictures are in the axes."""
    return sum(len(axis.images) for axis in figure.axes)


def _shown_texts(figure: Figure) -> list[Text]:
    figure.canvas.draw()
    hidden = set().union(*(_hidden_ticks(axis) for axis in figure.axes))
    return [
        text
        for text in figure.findobj(Text)
        if text.get_visible() and text.get_text().strip() and text not in hidden
    ]


def _hidden_ticks(axis: Axes) -> set[Text]:
    """Labels of ticks that exist and are not drawn: those beyond the limits, and those of axes that are off."""
    hidden: set[Text] = set()
    for each, limits in ((axis.xaxis, axis.get_xlim()), (axis.yaxis, axis.get_ylim())):
        low, high = sorted(limits)
        for tick in (*each.get_major_ticks(), *each.get_minor_ticks()):
            if not (axis.axison and low <= tick.get_loc() <= high):
                hidden |= {tick.label1, tick.label2}
    return hidden
