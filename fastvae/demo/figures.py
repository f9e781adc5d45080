"""Pictures as PNG, drawn without a display and without touching matplotlib's global state."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor

__all__ = ["COLOURS", "canvas", "image_rows", "png", "score_panels", "signed"]

COLOURS = {"VAE": "#64748b", "HVAE": "#c2410c"}
_FOREIGN = ("#c2410c", "#0e7490", "#a16207", "#7e22ce", "#15803d", "#be123c")
_INK, _GRID = "#334155", "#e2e8f0"
_DPI = 150


def canvas(width: float, height: float, columns: int = 1) -> tuple[Figure, list[Axes]]:
    """A figure of that size in inches with ``columns`` plain axes side by side."""
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = list(figure.subplots(1, columns, squeeze=False)[0])
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.spines[["left", "bottom"]].set_color(_INK)
        axis.tick_params(colors=_INK, labelsize=8)
        axis.grid(color=_GRID, linewidth=0.8)
        axis.set_axisbelow(True)
        axis.xaxis.label.set(color=_INK, size=9)
        axis.yaxis.label.set(color=_INK, size=9)
        axis.title.set(color=_INK, size=10)
    return figure, axes


def png(figure: Figure) -> bytes:
    """The figure as a PNG."""
    FigureCanvasAgg(figure)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=_DPI)
    return buffer.getvalue()


def image_rows(rows: Sequence[tuple[str, Tensor]], columns: int) -> bytes:
    """Blocks of images one under the other, each with its name at the left.

    Args:
        rows: name and images [N, C, H, W] in [0, 1] with C = 1 or 3 (other C: the mean over channels); N is a
            multiple of ``columns``.
        columns: images side by side.
    """
    blocks = [_tiled(images, columns) for _, images in rows]
    width = blocks[0].shape[1]
    inches = 6.4 / width
    heights = [block.shape[0] * inches for block in blocks]
    figure = Figure(figsize=(7.2, sum(heights) + 0.12 * (len(rows) + 1)))
    total = figure.get_figheight()
    top = total - 0.12
    for (name, _), block, height in zip(rows, blocks, heights, strict=True):
        axis = figure.add_axes((0.75 / 7.2, (top - height) / total, 6.4 / 7.2, height / total))
        axis.imshow(block, cmap="gray", vmin=0, vmax=1, interpolation="nearest", aspect="auto")
        axis.set_axis_off()
        figure.text(0.68 / 7.2, (top - height / 2) / total, name, ha="right", va="center", size=9, color=_INK)
        top -= height + 0.12
    return png(figure)


def score_panels(scores: Mapping[str, Mapping[str, Tensor]]) -> bytes:
    """Of each outlier score a histogram by set of images, and below it the ROC curves of the foreign sets.

    Args:
        scores: [N] by score and by set; the first set is the one that is not foreign. Histograms leave out the
            highest and lowest 1% of all, which can be far away.
    """
    figure = Figure(figsize=(max(7.2, 1.75 * len(scores)), 3.9), layout="constrained")
    panels = figure.subplots(2, len(scores), squeeze=False)
    for column, (name, by_set) in enumerate(scores.items()):
        values = {key: value.double().cpu().numpy() for key, value in by_set.items()}
        inside, *foreign = values
        low, high = np.quantile(np.concatenate(list(values.values())), (0.01, 0.99))
        edges = np.linspace(low, high if high > low else low + 1, 24)
        histogram, roc = panels[:, column]
        for key, colour in zip(values, (COLOURS["VAE"], *_FOREIGN), strict=False):
            histogram.hist(values[key], edges, histtype="stepfilled", color=colour, alpha=0.25)
            histogram.hist(values[key], edges, histtype="step", color=colour, linewidth=1.2, label=key)
            if key in foreign:
                thresholds = np.concatenate(
                    ([np.inf], np.sort(np.concatenate((values[inside], values[key])))[::-1])
                )
                false, true = ((values[of][:, None] >= thresholds).mean(0) for of in (inside, key))
                roc.plot(false, true, color=colour, linewidth=1.4)
        histogram.set(title=name, yticks=[])
        roc.plot([0, 1], [0, 1], color=_GRID, linewidth=0.8)
        roc.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02), xlabel="false positives", aspect="equal")
        for axis in (histogram, roc):
            axis.spines[["top", "right"]].set_visible(False)
            axis.tick_params(colors=_INK, labelsize=7)
            axis.title.set(color=_INK, size=9)
            axis.xaxis.label.set(color=_INK, size=8)
            axis.yaxis.label.set(color=_INK, size=8)
    panels[1, 0].set_ylabel("true positives")
    handles, labels = panels[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False, fontsize=8)
    return png(figure)


def signed(images: Tensor, largest: float) -> Tensor:
    """Images of any sign as colours [N, 3, H, W]: white at 0, red at ``largest``, blue at minus that.

    Args:
        images: [N, C, H, W]; the mean over channels is shown.
        largest: above 0; beyond it colours do not change.
    """
    shade = (images.mean(1) / largest).clamp(-1, 1)
    return torch.stack([1 + shade.clamp(max=0), 1 - shade.abs(), 1 - shade.clamp(min=0)], 1)


def _tiled(images: Tensor, columns: int) -> np.ndarray:
    """The images as one, with white gaps: [h, w] or [h, w, 3]."""
    if images.shape[1] not in (1, 3):
        images = images.mean(1, keepdim=True)
    count, channels, height, width = images.shape
    gap = max(1, round(height / 12))
    lines = count // columns
    sheet = np.ones((lines * (height + gap) - gap, columns * (width + gap) - gap, channels), np.float32)
    for index, image in enumerate(images.detach().cpu().permute(0, 2, 3, 1).numpy()):
        y, x = index // columns * (height + gap), index % columns * (width + gap)
        sheet[y : y + height, x : x + width] = image
    return sheet[:, :, 0] if channels == 1 else sheet
