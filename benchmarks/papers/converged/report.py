"""The tables and the figure."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from pathlib import Path

from ..shared import Row, measured_on, table, write_results
from .training import MODELS

PUBLISHED = "VAE 83.20, HVAE with K = 10 82.62 on 50,000 MNIST images"


def paired(rows: Sequence[Row]) -> list[Row]:
    """HVAE - VAE of each seed that has both, then of the means over seeds ("seed" is None)."""
    by_seed: dict[int, dict[str, Row]] = {}
    for row in rows:
        by_seed.setdefault(row["seed"], {})[row["model"]] = row
    both = {seed: [models[kind] for kind in MODELS] for seed, models in by_seed.items() if len(models) == 2}
    found: list[Row] = []
    for measure in ("nll", "ais"):
        differences = {
            seed: [ours - theirs for theirs, ours in zip(vae[measure], hvae[measure], strict=True)]
            for seed, (vae, hvae) in both.items()
            if measure in vae and measure in hvae
        }
        means = [statistics.fmean(values) for values in differences.values()]
        for seed, values in differences.items():
            error = statistics.stdev(values) / math.sqrt(len(values))
            found.append(
                {
                    "measure": measure.upper(),
                    "seed": str(seed),
                    "difference": statistics.fmean(values),
                    "error": error,
                }
            )
        if len(means) > 1:
            error = statistics.stdev(means) / math.sqrt(len(means))
            found.append(
                {
                    "measure": measure.upper(),
                    "seed": "all",
                    "difference": statistics.fmean(means),
                    "error": error,
                }
            )
    for measure in ("steps", "seconds"):
        for seed, (vae, hvae) in both.items():
            limit = min(vae[measure], hvae[measure])
            ends = [best_within(row, measure, limit) for row in (vae, hvae)]
            name = f"validation -ELBO within {limit:.0f} {measure}"
            found.append({"measure": name, "seed": str(seed), "difference": ends[1] - ends[0], "error": None})
    return found


def best_within(row: Row, measure: str, limit: float) -> float:
    """The lowest validation loss up to so many steps or seconds; inf if the first epoch takes longer."""
    unit = row[measure] / row["steps"]
    steps, losses = row["curve"]["steps"], row["curve"]["validation"]
    return min(
        (loss for step, loss in zip(steps, losses, strict=True) if step * unit <= limit * (1 + 1e-9)),
        default=math.inf,
    )


def as_text(rows: Sequence[Row], settings: Row) -> str:
    shown = []
    for row in rows:
        shown.append(
            {**row, "nll": statistics.fmean(row["nll"]), "done": "yes" if row["converged"] else "capped"}
        )
        shown[-1]["ais"] = statistics.fmean(row["ais"]) if "ais" in row else None
        shown[-1]["nll_there"] = statistics.fmean(row["nll"][: len(row["ais"])]) if "ais" in row else None
    first = table(
        shown,
        [
            ("seed", "seed", "d"),
            ("model", "model", ""),
            ("epochs", "epochs", "d"),
            ("done", "converged", ""),
            ("steps_to_best", "steps to the best", "d"),
            ("seconds", "training s", ".0f"),
            ("validation", "validation -ELBO", ".2f"),
            ("nll", "test NLL", ".2f"),
            ("nll_there", "on AIS's images", ".2f"),
            ("ais", "by AIS", ".2f"),
            ("diverged", "diverged", "d"),
        ],
    )
    second = table(
        paired(rows),
        [
            ("measure", "HVAE minus VAE", ""),
            ("seed", "seed", ""),
            ("difference", "nats", "+.3f"),
            ("error", "s.e.", ".3f"),
        ],
    )
    network = settings["network"]
    if network == "convolutional":
        network += f" of width {settings['width']} ({settings['initialization']} initialisation)"
    return (
        f"HVAE (free tempering, K = {settings['leapfrog_steps']}) against VAE, each to convergence: validation gain "
        f"under {settings['gain']:g} nats in {settings['window']} epochs, at most {settings['max_epochs']} epochs. "
        f"{settings['data']}, {settings['train_images']} training images, {network}, Adam {settings['lr']:g}, batches "
        f"of {settings['batch_size']}. NLL of {settings['test_images']} test images by {settings['num_samples']} "
        f"importance samples; AIS with {settings['ais_temperatures']} temperatures and 16 chains from the encoder's "
        f"posterior on the first {settings['ais_images']} of them. Paper: {PUBLISHED}.\n\n{first}\n\nBelow 0 HVAE is "
        f"better. The standard error is over images, for all seeds over seeds.\n\n{second}\n\n"
        f"{measured_on(settings)}"
    )


def write_all(rows: Sequence[Row], settings: Row, path: Path) -> None:
    """What there is so far, at ``path`` with .json, .md and .png behind it."""
    results = {"settings": settings, "runs": rows, "differences": paired(rows)}
    write_results(path.parent, path.name, results, as_text(rows, settings))
    draw(rows, path.with_name(f"{path.name}.png"))


def draw(rows: Sequence[Row], path: Path) -> None:
    """Validation losses: from the start, and where both have left the plateau, against epochs and time."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 3), layout="constrained")
    FigureCanvasAgg(figure)
    whole, by_steps, by_seconds = figure.subplots(1, 3)
    seen: set[str] = set()
    for row in rows:
        steps, losses = row["curve"]["steps"], row["curve"]["validation"]
        color = {"VAE": "tab:orange", "HVAE": "tab:blue"}[row["model"]]
        label = None if row["model"] in seen else row["model"]
        seen.add(row["model"])
        whole.plot(steps, losses, color=color, linewidth=1)
        by_steps.plot(steps, losses, color=color, linewidth=1, label=label)
        unit = row["seconds"] / row["steps"]
        by_seconds.plot([step * unit for step in steps], losses, color=color, linewidth=1)
    lowest = [row["validation"] for row in rows]
    for axes in (by_steps, by_seconds):
        axes.set_ylim(min(lowest) - 1, max(lowest) + 8)
    whole.set(xscale="log", xlabel="steps, from the first epoch on", ylabel="validation -ELBO (nats)")
    by_steps.set(xlabel="steps")
    by_seconds.set(xlabel="training seconds")
    by_steps.legend(frameon=False)
    figure.savefig(path, dpi=120)
