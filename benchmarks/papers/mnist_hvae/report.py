"""The tables and the figure."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..shared import Row, measured_on, table
from .comparison import EQUAL_STEPS, EQUAL_TIME, HVAE


def as_text(models: Sequence[Row], paired: Sequence[Row], settings: Row) -> str:
    first = table(
        models,
        [
            ("seed", "seed", "d"),
            ("model", "model", ""),
            ("steps", "steps", "d"),
            ("seconds", "training s", ".0f"),
            ("train_loss", "train -ELBO", ".2f"),
            ("test_loss", "test -ELBO", ".2f"),
            ("nll", "test NLL", ".2f"),
            ("nll_half", "NLL, half", ".2f"),
            ("diverged", "diverged", "d"),
        ],
    )
    second = table(
        [{**row, "seed": "all" if row["seed"] is None else str(row["seed"])} for row in paired],
        [
            ("against", "HVAE minus", ""),
            ("seed", "seed", ""),
            ("difference", "NLL difference", "+.3f"),
            ("se_images", "s.e. over images", ".3f"),
            ("sd_seeds", "s.d. over seeds", ".3f"),
            ("difference_half", "difference, half", "+.3f"),
            ("lower_share", "images with lower NLL", ".1%"),
        ],
    )
    return (
        f"HVAE (free tempering, K = {settings['leapfrog_steps']}) against VAE: {settings['data']}, "
        f"{settings['train_images']} training images, {settings['steps']} steps of {settings['batch_size']} "
        f"({settings['epochs']:.1f} epochs); {settings['test_images']} test images, "
        f"{settings['num_samples']} importance samples each. In nats; NLL and -ELBO are per image.\n\n{first}"
        f"\n\nPaired by test image; below 0 HVAE is better. Train -ELBO is the mean over the last epoch; "
        f"diverged counts trajectories of training that were given up.\n\n{second}\n\n{measured_on(settings)}"
    )


def draw(seeds: Sequence[dict[str, Row]], paired: Sequence[Row], path: Path) -> None:
    """Test -ELBO against steps and seconds, and the paired differences."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3), layout="constrained")
    FigureCanvasAgg(figure)
    by_steps, by_seconds, bars = figure.subplots(1, 3)
    for axes, key, label in ((by_steps, "steps", "steps"), (by_seconds, "seconds", "training seconds")):
        for seed, rows in enumerate(seeds):
            for name, color, text in ((HVAE, "tab:blue", "HVAE"), (EQUAL_TIME, "tab:orange", "VAE")):
                curve = rows[name]["curve"]
                # A run's pace is the median of its epochs, and known best at its end.
                unit = curve[-1][key] / curve[-1]["steps"] if curve else 1
                axes.plot(
                    [point["steps"] * unit for point in curve],
                    [point["test_loss"] for point in curve],
                    color=color,
                    linewidth=1,
                    label=None if seed else text,
                )
        axes.set(xlabel=label, ylabel="test -ELBO (nats)")
        # The first epochs would hide everything after them.
        last = [
            rows[name]["curve"][-1]["test_loss"]
            for rows in seeds
            for name in (HVAE, EQUAL_TIME)
            if rows[name]["curve"]
        ]
        if last:
            axes.set_ylim(min(last) - 3, max(last) + 12)
            axes.legend(frameon=False)
    for offset, (name, color) in enumerate(((EQUAL_STEPS, "tab:green"), (EQUAL_TIME, "tab:orange"))):
        chosen = [row for row in paired if row["against"] == name]
        bars.errorbar(
            [index + 0.15 * offset for index in range(len(chosen))],
            [row["difference"] for row in chosen],
            [row["se_images"] for row in chosen],
            fmt="o",
            color=color,
            label=name.removeprefix("VAE, "),
        )
    bars.axhline(0, color="gray", linewidth=0.8)
    bars.set_xticks(range(len(seeds) + 1), [*(f"seed {seed}" for seed in range(len(seeds))), "all"])
    bars.set_ylabel("NLL, HVAE - VAE (nats, s.e.)")
    bars.legend(frameon=False)
    figure.savefig(path, dpi=120)
