"""The tables and the figure."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..shared import Row, measured_on, table
from .measures import slope


def as_text(classical: Sequence[Row], sampling: Sequence[Row], noise: Sequence[Row], settings: Row) -> str:
    """The tables and what they are of, in Markdown."""
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
    third = table(
        noise,
        [
            ("checkpoints", "checkpoints", "d"),
            ("common", "the same noise at each", ".1%"),
            ("common_error", "s.e.", ".1%"),
            ("fresh", "fresh noise at each (ours)", ".1%"),
            ("fresh_error", "s.e.", ".1%"),
        ],
    )
    return (
        f"Influence of a training point in closed form against refits without it, "
        f"{settings['queries']} training points "
        f"and {settings['queries']} new ones as queries, all pairs. That of the mixture is of first order: its error "
        f"falls with N to the power {settings['mixture_slope']:.2f} (theory: -2).\n\n{first}\n\n"
        f"VAE-TracIn on {settings['data']}, {settings['pairs']} x {settings['pairs']} pairs, "
        f"{settings['trials']} trials, "
        f"against S = {settings['reference']}: root mean square error over that of the scores, falling with S to the "
        f"power {slope(sampling, 'draws', 'error'):.2f} (theory: -0.5).\n\n{second}\n\n"
        f"Training images that are their own strongest proponent among all {settings['images']}, with independent "
        f"noise on both sides, S = {settings['fewest_draws']}: {2 * settings['pairs']} of them, mean of "
        f"{settings['trials']} seeds of the noise, with its standard error. "
        f"What the same draws at every checkpoint get wrong adds up over checkpoints; "
        f"what fresh ones get wrong averages out.\n\n{third}\n\n{measured_on(settings)}"
    )


def draw(classical: Sequence[Row], sampling: Sequence[Row], noise: Sequence[Row], path: Path) -> None:
    """Errors of the closed forms against N, the sampling error against S, retrieval against checkpoints."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 3), layout="constrained")
    FigureCanvasAgg(figure)
    left, right, last = figure.subplots(1, 3)
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
    for name, label in (("fresh", "fresh noise at each checkpoint"), ("common", "the same noise at each")):
        counts = [row["checkpoints"] for row in noise]
        last.plot(counts, [row[name] for row in noise], marker="o", label=label)
    last.set(xlabel="checkpoints", ylabel="own strongest proponent", ylim=(0, 1))
    last.legend(frameon=False)
    figure.savefig(path, dpi=120)
