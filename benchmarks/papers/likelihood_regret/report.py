"""The table of the likelihood regret's experiment."""

from __future__ import annotations

from collections.abc import Mapping

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
    """AUROC with its interval, AUPR and FPR at 95% TPR of each score."""
    rows: list[Row] = []
    for name, by_set in scores.items():
        found = ood_metrics(by_set[inside], by_set[outside])
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
            }
        )
    return rows


def as_text(rows: list[Row], settings: Row) -> str:
    columns = [
        ("score", "score", ""),
        ("auroc", "AUROC", ".3f"),
        ("low", "95% from", ".3f"),
        ("high", "to", ".3f"),
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
        "intervals are bootstrap intervals over the choice of images, one trained model.\n\n"
        f"{table(rows, columns)}\n\n{measured_on(settings)}"
    )
