"""Outlier scores: histograms by set of samples, and ROC curves."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import cycle

import numpy as np
from matplotlib.figure import Figure
from torch import Tensor

from fastvae.arguments import expect
from fastvae.plot.drawing import COLOURS, FONT, GRID, panels
from fastvae.plot.images import as_tensor

__all__ = ["score_histograms"]

_BINS = 24


def score_histograms(
    scores: Mapping[str, Mapping[str, Tensor | np.ndarray | Sequence[float]]], *, noun: str = "images"
) -> Figure:
    """A row for each score: at the left a histogram by set of samples, at the right ROC curves of the foreign sets.

    Histograms leave out the highest and lowest 1% of all values, which can be far away.

    Args:
        scores: [N] by score and by set, higher = more foreign; the first set is the one that is not foreign.
        noun: what is scored, in the plural.

    Raises:
        ValueError: no scores, or scores that are not [N] with finite values.
    """
    expect(
        bool(scores) and all(scores.values()),
        "plot.score_histograms: scores: expected at least one score of at least one set",
        "none",
    )
    sets = max(map(len, scores.values()))
    figure, rows = panels(len(scores), 2, 1.75, 0.25 * math.ceil(sets / 3))
    for (name, by_set), (histogram, roc) in zip(scores.items(), rows, strict=True):
        values = {key: _finite(name, key, value) for key, value in by_set.items()}
        inside, *foreign = values
        low, high = np.quantile(np.concatenate(list(values.values())), (0.01, 0.99))
        edges = np.linspace(low, high if high > low else low + 1, _BINS).tolist()
        for key, colour in zip(values, cycle(COLOURS), strict=False):
            weights = np.full(len(values[key]), 1 / len(values[key]))
            histogram.hist(
                values[key], edges, weights=weights, histtype="stepfilled", color=colour, alpha=0.25
            )
            histogram.hist(
                values[key], edges, weights=weights, histtype="step", color=colour, linewidth=1.2, label=key
            )
            if key in foreign:
                roc.plot(*_roc(values[inside], values[key]), color=colour, linewidth=1.4)
        histogram.set_title(name, size=FONT)
        histogram.set(yticks=[], ylabel=f"share of {noun}")
        roc.plot([0, 1], [0, 1], color=GRID, linewidth=0.8)
        roc.set(xlim=(-0.03, 1.03), ylim=(-0.03, 1.03), xticks=[0, 0.5, 1], yticks=[0, 0.5, 1])
        roc.set_title("ROC", size=FONT)
        roc.set_ylabel("true positives")
    rows[-1][0].set_xlabel("score, higher = more foreign")
    rows[-1][1].set_xlabel("false positives")
    handles, labels = rows[0][0].get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="outside lower center", ncols=min(3, len(labels)), frameon=False, fontsize=FONT
    )
    return figure


def _roc(inside: np.ndarray, foreign: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Shares of both above every threshold: false positives, true positives."""
    thresholds = np.concatenate(([np.inf], np.sort(np.concatenate((inside, foreign)))[::-1]))
    false, true = (1 - np.searchsorted(np.sort(of), thresholds) / len(of) for of in (inside, foreign))
    return false, true


def _finite(name: str, key: str, scores: Tensor | np.ndarray | Sequence[float]) -> np.ndarray:
    values = as_tensor("plot.score_histograms", "scores", scores).detach().cpu().double().numpy()
    expect(
        values.ndim == 1 and len(values) > 0 and bool(np.isfinite(values).all()),
        f"plot.score_histograms: scores: expected finite values [N], N >= 1, of {name!r} for {key!r}",
        list(values.shape),
    )
    return values
