"""Training of all models in turns, and their scores."""

from __future__ import annotations

import argparse
import functools
import math
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

import fastvae
from fastvae.data import FactorSpace, three_dots
from fastvae.metrics import local_codes, mig, modularity

from ..shared import Row, keep_epochs, last_epoch, stored, training_seconds
from .networks import build

MODELS = ("beta-VAE", "JL1-VAE")
SCORES = {"mig": "local MIG", "modularity": "local modularity"}
PUBLISHED = {("mig", 0.1): (0.054, 0.123), ("modularity", 0.1): (0.888, 0.940)}
"""Medians in the paper, in the order of MODELS. At rho = 1 it reports no difference."""


class Draws:
    """An epoch is so many batches of new images, whose factors come from torch's global generator."""

    def __init__(self, space: FactorSpace, batch_size: int, steps: int, device: str) -> None:
        self.space, self.batch_size, self.steps, self.device = space, batch_size, steps, device

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[Tensor]:
        for _ in range(self.steps):
            yield self.space.render(self.space.sample(self.batch_size).to(self.device))


@dataclass
class Run:
    """A model in training, which goes on from the state after its last whole epoch in ``folder``."""

    seed: int
    kind: str
    model: fastvae.VAE
    folder: Path
    loader: Draws
    learning_rate: float

    def __post_init__(self) -> None:
        self.history = fastvae.History()
        if saved := last_epoch(self.folder):
            self.train_to(saved)

    @property
    def epochs(self) -> int:
        return len(self.history.steps)

    def train_to(self, epoch: int) -> None:
        self.history = fastvae.fit(
            self.model,
            self.loader,
            epochs=epoch,
            optimizer=functools.partial(torch.optim.Adam, lr=self.learning_rate),
            run_dir=self.folder,
            seed=self.seed,
            progress=False,
        )
        keep_epochs(self.folder, (epoch,))


def start(arguments: argparse.Namespace) -> list[Run]:
    """The runs of all seeds and models, as far as they had come."""
    space = three_dots(1, size=arguments.size).space
    loader = Draws(space, arguments.batch_size, arguments.epoch_steps, arguments.device)
    return [
        Run(
            seed,
            kind,
            build(kind, seed, arguments),
            arguments.checkpoint / f"seed-{seed}" / kind.lower(),
            loader,
            arguments.lr,
        )
        for seed in range(arguments.seeds)
        for kind in MODELS
    ]


def train(runs: Sequence[Run], epochs: int, minutes: float) -> None:
    """Train all to ``epochs``, an epoch each in turn, or to the last that all end within so many minutes."""
    started, longest = time.perf_counter(), 0.0
    done = min(run.epochs for run in runs)
    with tqdm(total=epochs, initial=done, desc="training", unit="epoch", disable=None) as bar:
        # An interrupted round is always finished: all models are compared at the same steps.
        for epoch in range(done + 1, max(epochs, *(run.epochs for run in runs)) + 1):
            round_started = time.perf_counter()
            interrupted = any(run.epochs >= epoch for run in runs)
            if not interrupted and round_started - started + longest > 60 * minutes:
                return
            for run in runs:
                if run.epochs < epoch:
                    run.train_to(epoch)
            longest = max(longest, time.perf_counter() - round_started)
            bar.update(1)
            losses = [f"{run.history.train_loss[-1]:.1f}" for run in runs]
            bar.set_postfix_str(f"loss {' '.join(losses)}", refresh=False)


def scores_of(run: Run, arguments: argparse.Namespace) -> Row:
    """Local scores, and what the model pays for them on images of its own kind; computed once a state."""
    key = {
        "steps": run.history.steps[-1],
        **{name: getattr(arguments, name) for name in ("rho", "points", "clusters", "test_images")},
    }
    found = stored(run.folder / "scores.json", key, lambda: _score(run, arguments))
    return {
        "seed": run.seed,
        "model": run.kind,
        "steps": run.history.steps[-1],
        "seconds": training_seconds(run.history),
        "ms_per_step": 1e3 * training_seconds(run.history) / run.history.steps[-1],
        **found,
    }


@torch.no_grad()
def _score(run: Run, arguments: argparse.Namespace) -> Row:
    space, model = run.loader.space, run.model.eval()
    scores: Row = {}
    total = len(arguments.rho) * arguments.clusters
    with tqdm(total=total, desc=f"seed {run.seed}: scoring {run.kind}", unit="cluster", disable=None) as bar:
        for rho in arguments.rho:
            both: list[tuple[float, float]] = []
            for codes, factors in local_codes(
                model, space, rho, num_points=arguments.points, num_clusters=arguments.clusters
            ):
                both.append((mig(codes, factors, bins=5), modularity(codes, factors, bins=5)))
                bar.update(1)
            for name, values in zip(SCORES, zip(*both, strict=True), strict=True):
                scores[f"{name} {rho:g}"] = statistics.fmean(values)
    generator = torch.Generator().manual_seed(0)
    x = space.render(space.sample(arguments.test_images, generator)).to(arguments.device)
    elbo, jacobian, active = [], [], []
    for part in x.split(100):
        step = model.objective(part, beta=1.0, generator=generator)
        elbo.append(-step.loss.double())
        jacobian.append(fastvae.ops.jacobian_l1(model.decoder, step.z, "none", output="sigmoid").double())
        active.append(step.mu)
    scores["elbo"] = float(torch.cat(elbo).mean())
    scores["jacobian_l1"] = float(torch.cat(jacobian).mean())
    scores["active"] = int((torch.cat(active).var(0) > 0.01).sum())
    return scores


def summaries(rows: Sequence[Row], rhos: Sequence[float]) -> list[Row]:
    """For every score and rho: median and range of each model over the seeds, and the published medians."""
    results = []
    for name, label in SCORES.items():
        for rho in rhos:
            values = {
                kind: [row[f"{name} {rho:g}"] for row in rows if row["model"] == kind] for kind in MODELS
            }
            paired = [ours - theirs for theirs, ours in zip(*values.values(), strict=True)]
            published = PUBLISHED.get((name, rho), (None, None))
            row: Row = {"score": label, "rho": rho, "seeds": len(paired)}
            for kind, paper in zip(MODELS, published, strict=True):
                row[kind] = statistics.median(values[kind])
                row[f"{kind} range"] = f"{min(values[kind]):.3f} to {max(values[kind]):.3f}"
                row[f"{kind} published"] = paper
            row["difference"] = statistics.fmean(paired)
            error = statistics.stdev(paired) / math.sqrt(len(paired)) if len(paired) > 1 else None
            row["difference_se"] = error
            results.append(row)
    return results
