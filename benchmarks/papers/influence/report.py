"""The tables and the figure."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from shared import Row, table

from .measures import slope


def as_text(classical: Sequence[Row], sampling: Sequence[Row], settings: Row) -> str:
    """Both tables and what they are of, in Markdown."""
    first = table(
        classical,
        [
            ("density", "density", ""),
            ("train", "N", "d"),
            ("error", "largest difference to refits", ".1e"),
            ("largest", "largest influence", ".3f"),
            ("own_strongest", "own strongest proponent", ".0%"),
        ],
    )
    second = table(sampling, [("draws", "S", "d"), ("error", "error / scores", ".4f")])
    return (
        f"Influence of a training point in closed form against refits without it, "
        f"{settings['queries']} training points "
        f"and {settings['queries']} new ones as queries, all pairs. That of the mixture is of first order: its error "
        f"falls with N to the power {settings['mixture_slope']:.2f} (theory: -2).\n\n{first}\n\n"
        f"VAE-TracIn on {settings['data']}, {settings['pairs']} x {settings['pairs']} pairs, "
        f"{settings['trials']} trials, "
        f"against S = {settings['reference']}: root mean square error over that of the scores, falling with S to the "
        f"power {slope(sampling, 'draws', 'error'):.2f} (theory: -0.5).\n\n{second}\n"
    )


def draw(classical: Sequence[Row], sampling: Sequence[Row], path: Path) -> None:
    """Errors of the closed forms against N, and the sampling error against S with its slope."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    for name in dict.fromkeys(row["density"] for row in classical):
        rows = [row for row in classical if row["density"] == name]
        left.plot([row["train"] for row in rows], [row["error"] for row in rows], marker="o", label=name)
    left.set(xscale="log", yscale="log", xlabel="training points N", ylabel="largest difference to refits")
    left.legend(frameon=False)
    draws, errors = [row["draws"] for row in sampling], [row["error"] for row in sampling]
    right.plot(draws, errors, marker="o", label=f"VAE-TracIn, slope {slope(sampling, 'draws', 'error'):.2f}")
    right.plot(
        draws, [errors[0] * (s / draws[0]) ** -0.5 for s in draws], "--", color="gray", label="slope -1/2"
    )
    right.set(xscale="log", yscale="log", xlabel="draws S", ylabel="error / scores")
    right.legend(frameon=False)
    figure.savefig(path, dpi=120)
