"""The tables and the figure."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path

from ..shared import Row, measured_on, table
from .comparison import MODELS, PUBLISHED, SCORES

COLOURS = dict(zip(MODELS, ("tab:gray", "tab:red"), strict=True))


def as_text(rows: Sequence[Row], summary: Sequence[Row], settings: Row) -> str:
    """Both tables and what they are of, in Markdown."""
    columns = [("score", "score", ""), ("rho", "rho", "g")]
    for kind in MODELS:
        columns += [
            (kind, kind, ".3f"),
            (f"{kind} range", "range", ""),
            (f"{kind} published", "published", ".3f"),
        ]
    columns += [("difference", "JL1-VAE minus beta-VAE", "+.3f"), ("difference_se", "s.e.", ".3f")]
    scores = [
        (f"{name} {rho:g}", f"{name}, rho {rho:g}", ".3f") for name in SCORES for rho in settings["rho"]
    ]
    single = [
        ("seed", "seed", "d"),
        ("model", "model", ""),
        ("steps", "steps", "d"),
        ("ms_per_step", "ms a step", ".1f"),
        ("elbo", "ELBO, nats", ".1f"),
        ("jacobian_l1", "J1", ".1f"),
        ("active", "active codes", "d"),
        *scores,
    ]
    paces = {
        kind: statistics.median(row["ms_per_step"] for row in rows if row["model"] == kind) for kind in MODELS
    }
    steps, whole = settings["steps_taken"], settings["steps"]
    ended = f"{steps} steps" if steps >= whole else f"{steps} of {whole} steps, ended by --minutes"
    unfinished = (
        ""
        if steps >= settings["anneal_steps"]
        else " **beta and gamma had not reached their values: they were still growing.**"
    )
    return (
        f"Three dots, 1x{settings['size']}x{settings['size']}: JL1-VAE (gamma {settings['gamma']:g}) against beta-VAE, "
        f"both with beta {settings['beta']:g}; {ended} of {settings['batch_size']}, beta and gamma growing over the "
        f"first {settings['anneal_steps']}.{unfinished} The paper takes 300,000 steps. Medians and ranges over "
        f"{settings['seeds']} seeds; each score is the mean over {settings['clusters']} clusters of "
        f"{settings['points']} points. Published: medians of Rhodes and Lee, NeurIPS 2021.\n\n"
        f"{table(summary, columns)}\n\n"
        f"{table(rows, single)}\n\n"
        f"A training step with the penalty takes {paces[MODELS[1]] / paces[MODELS[0]]:.2f} times the time of one "
        f"without. ELBO (beta 1) and J1 (sum of |dy/dz| of an image) are means over {settings['test_images']} new "
        "images; a code is active if the variance of its mean over them is above 0.01.\n\n"
        f"{measured_on(settings)}"
    )


def draw(rows: Sequence[Row], rhos: Sequence[float], path: Path) -> None:
    """Every run's scores against rho, and the published medians."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, (name, label) in zip(figure.subplots(1, len(SCORES)), SCORES.items(), strict=True):
        for place, rho in enumerate(rhos):
            for side, kind in enumerate(MODELS):
                values = [row[f"{name} {rho:g}"] for row in rows if row["model"] == kind]
                at, color = place + 0.3 * (side - 0.5), COLOURS[kind]
                axes.plot([at] * len(values), values, "o", color=color, label=None if place else kind)
                axes.hlines(statistics.median(values), at - 0.1, at + 0.1, color=color)
                if (name, rho) in PUBLISHED:
                    paper = PUBLISHED[name, rho][side]
                    axes.hlines(
                        paper,
                        at - 0.12,
                        at + 0.12,
                        color=color,
                        linestyle=":",
                        label=f"{kind}, published median",
                    )
        axes.set_xticks(range(len(rhos)), [f"rho = {rho:g}" for rho in rhos])
        axes.set_xlim(-0.6, len(rhos) - 0.4)
        axes.set_ylabel(label)
    axes.legend(frameon=False, fontsize=7)
    figure.savefig(path, dpi=120)
