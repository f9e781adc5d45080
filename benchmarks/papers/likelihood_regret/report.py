"""The table of the likelihood regret's experiment."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from scipy import stats
from torch import Tensor

from fastvae.metrics import ood_metrics

from ..shared import Row, measured_on, table

PUBLISHED = {("fashion-mnist", "mnist"): {"regret": "0.99", "NLL": "below 0.5"}}
"""AUROC by the data that a model was trained on and the foreign ones (Xiao, Yan, Amit, NeurIPS 2020); of the likelihood
alone they say "far below 0.5"."""


def published_for(data: str, foreign: str) -> Mapping[str, str]:
    """What the paper reports of the pair of data sets with such names, by score."""
    for (inside, outside), found in PUBLISHED.items():
        if data.startswith(inside) and foreign.startswith(outside):
            return found
    return {}


def measures(
    scores: Mapping[str, Mapping[str, Tensor]], inside: str, outside: str, published: Mapping[str, str]
) -> list[Row]:
    """AUROC with its interval, AUPR and FPR at 95% TPR of each score, and its AUROC beside regret's."""
    rows: list[Row] = []
    regret = scores.get("regret")
    for name, by_set in scores.items():
        found = ood_metrics(by_set[inside], by_set[outside])
        gain = None if regret is None or name == "regret" else gained(by_set, regret, inside, outside)
        rows.append(
            {
                "score": name,
                "auroc": found.auroc,
                "low": found.auroc_interval[0],
                "high": found.auroc_interval[1],
                "aupr": found.aupr,
                "fpr95": found.fpr95,
                "inside": float(by_set[inside].mean()),
                "outside": float(by_set[outside].mean()),
                "published": published.get(name),
                "gain": None if gain is None else "{:+.3f} ({:+.3f} to {:+.3f})".format(*gain),
            }
        )
    return rows


def gained(
    score: Mapping[str, Tensor], other: Mapping[str, Tensor], inside: str, outside: str, resamples: int = 1000
) -> tuple[float, float, float]:
    """By how much the AUROC is above that of another score of the same images, and its 95% bootstrap interval."""
    generator = np.random.default_rng(0)
    chosen = {
        name: np.concatenate(
            [np.arange(count)[None], generator.integers(0, count, (resamples, count))]  # first all of them
        )
        for name, count in ((name, len(score[name])) for name in (inside, outside))
    }

    def aurocs(of: Mapping[str, Tensor]) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
        known, foreign = (of[name].cpu().double().numpy()[chosen[name]] for name in (inside, outside))
        pairs = stats.mannwhitneyu(foreign, known, axis=1, method="asymptotic").statistic
        return np.asarray(pairs / (known.shape[1] * foreign.shape[1]))

    gain = aurocs(score) - aurocs(other)
    low, high = np.quantile(gain[1:], (0.025, 0.975))
    return float(gain[0]), float(low), float(high)


def as_text(rows: list[Row], settings: Row) -> str:
    columns = [
        ("score", "score", ""),
        ("auroc", "AUROC", ".3f"),
        ("low", "95% from", ".3f"),
        ("high", "to", ".3f"),
        ("gain", "minus regret's, paired", ""),
        ("published", "published AUROC", ""),
        ("aupr", "AUPR", ".3f"),
        ("fpr95", "FPR95", ".3f"),
        ("inside", "mean, held out", ".1f"),
        ("outside", "mean, foreign", ".1f"),
    ]
    return (
        f"{settings['data']} against {settings['ood']}: {settings['images']} held-out and {settings['ood_images']} "
        f"foreign images at 32x32. DCGAN VAE, {settings['width']} filters, {settings['latent_dim']} latent "
        f"variables, categorical likelihood; {settings['steps']} steps of {settings['batch_size']}, Adam "
        f"{settings['lr']:g} ({settings['epochs']:.2f} epochs; the paper: 200 of batches of 128, Adam 3e-4), "
        f"background model {settings['background_steps']} steps. {settings['num_samples']} importance samples (paper: "
        f"1000), {settings['regret_steps']} steps of regret (paper: 100). Scores in nats, higher = more foreign; the "
        f"intervals are bootstrap intervals over the choice of images, one trained model (seed {settings['seed']}).\n\n"
        f"{table(rows, columns)}\n\n{measured_on(settings)}"
    )
