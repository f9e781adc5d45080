"""How well scores tell foreign samples from those like the training data."""

from __future__ import annotations

import importlib
from typing import NamedTuple

import numpy as np
from torch import Tensor

from fastvae._distribution import to_mend
from fastvae.arguments import expect, expect_at_least, expect_numbers

__all__ = ["OODMetrics", "ood_metrics"]


class OODMetrics(NamedTuple):
    """How well scores separate; the positives are the foreign samples, which should score higher."""

    auroc: float
    """Probability that a foreign sample scores higher than another; ties count half. Chance is 0.5."""
    auroc_interval: tuple[float, float]
    """Bootstrap percentile interval of it, over the choice of samples (not of the trained model)."""
    aupr: float
    """Average precision. Chance is the share of foreign samples."""
    fpr95: float
    """Share of the other samples above the threshold that 95% of the foreign ones reach. Best is 0."""


def ood_metrics(
    scores_in: Tensor, scores_out: Tensor, *, confidence: float = 0.95, resamples: int = 1000, seed: int = 0
) -> OODMetrics:
    """AUROC with a bootstrap interval, AUPR and FPR at 95% TPR, by scikit-learn and SciPy.

    Args:
        scores_in: [N] scores of samples like the training data, N >= 1.
        scores_out: [M] scores of foreign samples, M >= 1.
        confidence: of the interval.
        resamples: bootstrap samples, drawn from each of the two sets with replacement.
        seed: of the bootstrap.

    Raises:
        ValueError: scores that are not [N] and [M], or not finite; confidence or resamples out of range.
        ImportError: scikit-learn is not installed.
    """
    inside, outside = _scores("scores_in", scores_in), _scores("scores_out", scores_out)
    expect_numbers("ood_metrics", confidence=confidence, resamples=resamples, seed=seed)
    expect(0 < confidence < 1, "ood_metrics: confidence: expected a number between 0 and 1", confidence)
    expect_at_least("ood_metrics", 1, resamples=resamples)
    try:
        sklearn, stats = importlib.import_module("sklearn.metrics"), importlib.import_module("scipy.stats")
    except ModuleNotFoundError as error:
        raise ImportError(f"ood_metrics: needs scikit-learn; {to_mend('scikit-learn', 'ood')}") from error
    labels = np.concatenate((np.zeros(len(inside)), np.ones(len(outside))))
    scores = np.concatenate((inside, outside))
    false, true, _ = sklearn.roc_curve(labels, scores)
    generator = np.random.default_rng(seed)
    drawn = [generator.choice(part, (resamples, len(part))) for part in (outside, inside)]
    # The U statistic counts the pairs in which the first scores higher: the AUROC, not yet divided.
    pairs = stats.mannwhitneyu(*drawn, axis=1, method="asymptotic").statistic
    tail = (1 - confidence) / 2
    low, high = np.quantile(pairs / (len(inside) * len(outside)), (tail, 1 - tail))
    return OODMetrics(
        float(sklearn.roc_auc_score(labels, scores)),
        (float(low), float(high)),
        float(sklearn.average_precision_score(labels, scores)),
        float(false[np.argmax(true >= 0.95)]),
    )


def _scores(name: str, scores: Tensor) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    values = scores.detach().cpu().double().numpy()
    expect(
        values.ndim == 1 and len(values) > 0,
        f"ood_metrics: {name}: expected shape [N] with N >= 1",
        list(scores.shape),
    )
    if not np.isfinite(values).all():
        bad = int((~np.isfinite(values)).sum())
        raise ValueError(f"ood_metrics: {name}: expected finite scores, got {bad} NaN or infinite")
    return values
