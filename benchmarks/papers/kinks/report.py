"""The tables and the figure."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path

from ..shared import Row, measured_on, table


def summaries(rows: Sequence[Row]) -> list[Row]:
    """Means over seeds, and how much lower the objective is with differences: mean and standard error, paired."""
    found: list[Row] = []
    cases = dict.fromkeys((row["network"], row["activation"], row["gamma"]) for row in rows)
    for network, activation, gamma in cases:
        of_case = [
            row
            for row in rows
            if (row["network"], row["activation"], row["gamma"]) == (network, activation, gamma)
        ]
        estimators = list(dict.fromkeys(row["estimator"] for row in of_case))
        exact = [row for row in of_case if row["estimator"] == estimators[0]]
        for estimator in estimators:
            mine = [row for row in of_case if row["estimator"] == estimator]
            gains = [a["objective"] - b["objective"] for a, b in zip(exact, mine, strict=True)]
            summary: Row = {
                "network": network,
                "activation": activation,
                "gamma": gamma,
                "estimator": estimator,
            }
            for key in ("objective", "reconstruction", "kl", "penalty"):
                summary[key] = statistics.mean(row[key] for row in mine)
            summary["gain"] = None if estimator == estimators[0] else statistics.mean(gains)
            summary["gain_error"] = None
            if summary["gain"] is not None and len(gains) > 1:
                summary["gain_error"] = statistics.stdev(gains) / len(gains) ** 0.5
            found.append(summary)
    return found


def as_text(gradients: Sequence[Row], summary: Sequence[Row], settings: Row) -> str:
    """Both tables and what they are of, in Markdown."""
    first = table(
        gradients,
        [
            ("activation", "activation", ""),
            ("estimator", "estimator", ""),
            ("bias", "error of the mean gradient", ".1%"),
            ("sampling", "of it sampling, about", ".1%"),
            ("noise", "noise, batch of 64", ".1%"),
        ],
    )
    shown = [
        {
            **row,
            "gained": "-" if row["gain"] is None else f"{row['gain']:+.2f} +- {row['gain_error'] or 0:.2f}",
        }
        for row in summary
    ]
    second = table(
        shown,
        [
            ("network", "network", ""),
            ("activation", "activation", ""),
            ("gamma", "gamma", "g"),
            ("estimator", "estimator", ""),
            ("objective", "objective", ".2f"),
            ("reconstruction", "reconstruction", ".2f"),
            ("kl", "KL", ".2f"),
            ("penalty", "J1", ".2f"),
            ("gained", "lower than exact by", ""),
        ],
    )
    return (
        "The Jacobian penalty of decoders with kinks and without.\n\n"
        "**Gradients.** A 4-32-32-20 decoder at initialisation, float64; the derivative of the mean of J1 over "
        f"standard normal codes along {settings['directions']} directions in parameter space, by central differences "
        f"of that mean, against the mean of each estimator's gradients over {settings['codes']} codes: root mean "
        f"square over the directions, as a share of the derivative's.\n\n{first}\n\n"
        f"**Training.** VAEs, {settings['seeds']} seeds, Adam {settings['lr']:g}, batches of {settings['batch_size']}; "
        f"small: {settings['small']}, {settings['small_steps']} steps on 2,000 samples of four factors; dense: "
        f"{settings['dense']}, {settings['steps']} steps on {settings['data']}. The objective of unseen data, in nats, "
        f"is reconstruction + KL + gamma J1 with J1 exact for all; differences are paired by seed, +- standard error."
        f"\n\n{second}\n\n{measured_on(settings)}"
    )


def draw(gradients: Sequence[Row], summary: Sequence[Row], path: Path) -> None:
    """Error and noise of each estimator; what training reaches, less what it does with the exact one."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3.2), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    for activation, marker in (("ReLU", "o"), ("Softplus", "s")):
        rows = [row for row in gradients if row["activation"] == activation]
        for i, row in enumerate(rows):
            left.plot(
                row["noise"],
                row["bias"],
                marker,
                color=f"C{i}",
                label=f"{activation}, {row['estimator']}",
                fillstyle="full" if activation == "ReLU" else "none",
            )
    left.set(
        xscale="log",
        yscale="log",
        xlabel="noise of a batch of 64 / gradient",
        ylabel="error of the mean / gradient",
    )
    left.legend(frameon=False, fontsize=6)
    rows = [row for row in summary if row["gain"] is not None]
    names = [f"{row['network']}\n{row['activation']}\ngamma {row['gamma']:g}" for row in rows]
    right.bar(range(len(rows)), [row["gain"] for row in rows], yerr=[row["gain_error"] or 0 for row in rows])
    right.set_xticks(range(len(rows)), names, fontsize=6)
    right.axhline(0, color="gray", linewidth=0.5)
    right.set(ylabel="objective lower by, nats", title="differences of 0.01 against exact")
    figure.savefig(path, dpi=120)
