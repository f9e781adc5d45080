"""What an adapted step size is worth: HVAE against VAE with a Gaussian of scale 0.1 on 32x32 colour images.

    python -m benchmarks.papers.step_sizes                        20 seeds of 200 steps
    python -m benchmarks.papers.step_sizes --resume               go on after an interruption, or with more --seeds
    python -m benchmarks.papers.step_sizes --steps 2000 --seeds 2 --name step_sizes-longer --checkpoint runs/longer

The default step size of Caterini et al. (NeurIPS 2018), 0.2, is that of binary images. Here the curvature of
log p(x | z) is a hundred times as large and grows as the decoder learns. For each seed all models start from the same
weights and see the same batches; the loss is minus the ELBO of held-out images at the last step, in nats, the same
noise for all. "diverged" counts runs that ended in a DivergenceError or a loss that is not finite, "worst" is the
largest training loss after the first fifth of a run, and "acceptance" is that of ``HVAE.adapt_step_size``, of
trajectories of held-out images. Rows are written as seeds end: step_sizes.json and .md (or another --name).
"""

from __future__ import annotations

import argparse
import functools
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import fastvae
from fastvae.models.adaptation import conservation
from fastvae.ops import trajectory
from fastvae.progress import bar_of

from ..shared import (
    Row,
    add_folder,
    circumstances,
    claim_for,
    measured_on,
    stored,
    table,
    training_seconds,
    write_results,
)

SCALE = 0.1
MODELS: dict[str, dict[str, Any] | None] = {
    "VAE": None,
    "HVAE, adapted, target 0.65": {},
    "HVAE, adapted, target 0.95": {"target_acceptance": 0.95},
    "HVAE, 0.2, trained": {"step_size": 0.2},
    "HVAE, 0.01, trained": {"step_size": 0.01},
}


def photographs() -> Tensor:
    """Pieces [N, 3, 32, 32] in [0, 1] of scikit-learn's two photographs at half their size."""
    from sklearn.datasets import load_sample_images

    found = []
    for image in load_sample_images().images:
        small = nn.functional.avg_pool2d(torch.tensor(image).permute(2, 0, 1)[None] / 255, 2)[0]
        found.append(small.unfold(1, 32, 16).unfold(2, 32, 16).permute(1, 2, 0, 3, 4).reshape(-1, 3, 32, 32))
    return torch.cat(found)


def build(kind: str, num_steps: int, seed: int) -> fastvae.VAE | fastvae.HVAE:
    """For one seed all models have the same weights."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        encoder = nn.Sequential(
            *(nn.Conv2d(3, 16, 4, 2, 1), nn.SiLU(), nn.Conv2d(16, 32, 4, 2, 1), nn.SiLU()),
            *(nn.Flatten(), nn.Linear(2048, 32)),
        )
        decoder = nn.Sequential(
            *(nn.Linear(16, 2048), nn.SiLU(), nn.Unflatten(1, (32, 8, 8))),
            *(nn.ConvTranspose2d(32, 16, 4, 2, 1), nn.SiLU(), nn.ConvTranspose2d(16, 3, 4, 2, 1)),
        )
    options = MODELS[kind]
    if options is None:
        return fastvae.VAE(encoder, decoder, fastvae.Gaussian(SCALE))
    return fastvae.HVAE(encoder, decoder, fastvae.Gaussian(SCALE), num_steps=num_steps, **options)


class Worst(fastvae.training.Callback):
    """The largest training loss after so many steps."""

    def __init__(self, after: int) -> None:
        self.after, self.loss = after, -math.inf

    def on_step(self, training: fastvae.training.Training) -> None:
        """Looks at the step's."""
        if training.steps > self.after:
            self.loss = max(self.loss, training.loss)


@torch.no_grad()
def acceptance(model: fastvae.HVAE, x: Tensor) -> float:
    """At the step size in use; see ``HVAE.adapt_step_size``."""
    mu, logvar = model.encode(x)
    noise = model.draw_noise(mu, torch.Generator().manual_seed(1))
    z, rho = mu + (logvar / 2).exp() * noise[0], noise[1] * model.beta_0.rsqrt()
    points = trajectory(model.decoder, z, rho, x, model.step_size, model.alpha, model.likelihood)
    return float(conservation(points, model.alpha).mean())


def train_and_measure(
    kind: str, seed: int, train: Tensor, held_out: Tensor, arguments: argparse.Namespace
) -> Row:
    model = build(kind, arguments.leapfrog_steps, seed)
    worst = Worst(arguments.steps // 5)
    row: Row = {"model": kind, "seed": seed, "diverged": False, "loss": None, "worst": None}
    row |= dict.fromkeys(("acceptance", "step_size", "seconds"))
    loader = DataLoader(
        TensorDataset(train),
        arguments.batch_size,
        shuffle=True,
        generator=torch.Generator().manual_seed(seed),
    )
    try:
        history = fastvae.fit(
            model,
            loader,
            epochs=arguments.steps,
            max_steps=arguments.steps,
            seed=seed,
            callbacks=[worst],
            progress=False,
        )
    except FloatingPointError:
        return row | {"diverged": True}
    model.eval()
    with torch.no_grad():
        try:
            loss = -float(model.elbo(held_out, generator=torch.Generator().manual_seed(0)).mean())
        except fastvae.models.DivergenceError:
            loss = math.inf
    row |= {"loss": loss, "worst": worst.loss, "seconds": training_seconds(history)}
    if isinstance(model, fastvae.HVAE):
        row |= {"acceptance": acceptance(model, held_out), "step_size": float(model.step_size.detach())}
    return row | {"diverged": not math.isfinite(loss)}


def summary(rows: Sequence[Row]) -> list[Row]:
    """Of each model its mean loss, its difference to the VAE's of the same seed, and what it took."""
    found: list[Row] = []
    vae = {row["seed"]: row["loss"] for row in rows if row["model"] == "VAE"}
    for kind in MODELS:
        own = [row for row in rows if row["model"] == kind]
        whole = [row for row in own if not row["diverged"]]
        gains = [row["loss"] - vae[row["seed"]] for row in whole]
        line: Row = {"model": kind, "seeds": len(own), "diverged": sum(row["diverged"] for row in own)}
        for name in ("loss", "acceptance", "step_size", "seconds"):
            values = [row[name] for row in whole if row[name] is not None]
            line[name] = statistics.fmean(values) if values else None
        line["worst"] = max((row["worst"] for row in whole), default=None)
        line["gain"] = statistics.fmean(gains) if gains and kind != "VAE" else None
        line["gain_sd"] = statistics.stdev(gains) if len(gains) > 1 and kind != "VAE" else None
        line["below"] = None if kind == "VAE" else sum(gain < 0 for gain in gains)
        found.append(line)
    return found


COLUMNS = [
    *(("model", "", ""), ("seeds", "seeds", "d"), ("diverged", "diverged", "d"), ("loss", "loss", ".0f")),
    *(("gain", "minus the VAE's", "+.0f"), ("gain_sd", "its sd", ".0f"), ("below", "seeds below", "d")),
    *(("worst", "worst", ".3g"), ("acceptance", "acceptance", ".2f"), ("step_size", "step size", ".4f")),
    ("seconds", "s a run", ".1f"),
]


def as_text(lines: Sequence[Row], settings: Row) -> str:
    return (
        f"HVAE (K = {settings['leapfrog_steps']}, free tempering) and VAE with a Gaussian of scale {SCALE} on "
        f"{settings['train_images']} colour images of 32x32 ({settings['data']}), {settings['steps']} steps of "
        f"{settings['batch_size']} images, Adam 1e-3: minus the ELBO of {settings['held_out_images']} held-out images "
        f"in nats, means over seeds.\n\n{table(lines, COLUMNS)}\n\n"
        f"{measured_on(settings)}"
    )


def main(argv: Sequence[str] | None = None) -> None:
    arguments = parse(argv)
    claim_for(arguments, free=["seeds"])
    if arguments.data is None:
        name, images = "pieces of scikit-learn's photographs", photographs()
    else:
        data = fastvae.data.load(arguments.data, size=(32, 32), channels=3)
        name, images = Path(data.name).name, data.tensors()[0]
    images = images[torch.randperm(len(images), generator=torch.Generator().manual_seed(0))]
    split = max(1, len(images) // 10)
    settings: Row = {"data": name, "train_images": len(images) - split, "held_out_images": split}
    settings |= {key: getattr(arguments, key) for key in ("steps", "seeds", "batch_size", "leapfrog_steps")}
    settings |= {
        **circumstances(),
    }
    rows: list[Row] = []
    bar = bar_of(arguments.seeds * len(MODELS), "step sizes", "run", True)
    for seed in range(arguments.seeds):
        for kind in MODELS:
            run = functools.partial(train_and_measure, kind, seed, images[split:], images[:split], arguments)
            file = f"{list(MODELS).index(kind)}-{seed}.json"
            rows.append(stored(arguments.checkpoint / file, {"model": kind, "seed": seed}, run))
            bar.update(1)
        lines = summary(rows)
        results = {"settings": settings, "summary": lines, "runs": rows}
        write_results(arguments.out, arguments.name, results, as_text(lines, settings))
    bar.close()
    print(as_text(summary(rows), settings))
    print(f"Written: {arguments.out / arguments.name}.json and .md")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", help="colour images (default: pieces of scikit-learn's photographs)")
    parser.add_argument("--steps", type=int, default=200, help="of training (default: 200)")
    parser.add_argument("--seeds", type=int, default=20, help="default: 20")
    parser.add_argument("--batch-size", type=int, default=32, help="default: 32")
    parser.add_argument("--leapfrog-steps", type=int, default=5, help="K (default: 5)")
    parser.add_argument("--name", default="step_sizes", help="of the files written (default: step_sizes)")
    add_folder(parser, "step_sizes")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/papers"), help="folder")
    arguments = parser.parse_args(argv)
    for name in ("steps", "seeds", "batch_size", "leapfrog_steps"):
        if (value := getattr(arguments, name)) < 1:
            parser.error(f"--{name.replace('_', '-')}: expected at least 1, got {value}")
    return arguments


if __name__ == "__main__":
    main()
