"""Closed forms against refits, the sampling error of VAE-TracIn, and what its noise is keyed by."""

from __future__ import annotations

import argparse
import functools
import math
from collections.abc import Callable, Sequence
from statistics import mean, stdev
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import fastvae
from fastvae.influence import TracIn
from fastvae.noise import Stream, draws_of, keys_of
from fastvae.training import load_checkpoint

from ..shared import Row, stored
from . import densities

COMPONENTS = 3
DIM = 2
LATENTS = 8


def points(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Training points [N, d] of a mixture, and the component of each."""
    component = torch.arange(count) % COMPONENTS
    angle = 2 * math.pi * component / COMPONENTS
    centre = 2 * torch.stack([angle.cos(), angle.sin()], 1)
    scale = 0.4 + 0.2 * component
    noise = torch.randn(count, DIM, generator=generator, dtype=torch.float64)
    return centre.double() + scale[:, None] * noise, component


def refit(train: Tensor, log_density: Callable[[Tensor], Tensor], full: Tensor) -> Tensor:
    """[M, N] influences by leaving out one training point after the other; ``log_density`` of those kept."""
    everyone = torch.arange(len(train))
    return torch.stack([full - log_density(everyone[everyone != i]) for i in everyone], 1)


def closed_forms(count: int, queries: int, seed: int) -> list[Row]:
    """For each density of N points: the largest difference to the refits, and who is whose strongest proponent."""
    generator = torch.Generator().manual_seed(seed)
    train, component = points(count, generator)
    x = torch.cat([train[:queries], points(queries, generator)[0]])
    # The log density at x of the points that are kept, and the influences in closed form.
    learners: dict[str, tuple[Callable[[Tensor], Tensor], Tensor]] = {
        f"{densities.NEIGHBOURS}-NN density": (
            lambda kept: densities.knn_log_density(train[kept], x),
            densities.knn_influence(train, x),
        ),
        "kernel density": (
            lambda kept: densities.kernel_log_density(train[kept], x),
            densities.kernel_influence(train, x),
        ),
        "Gaussian mixture, first order": (
            lambda kept: densities.mixture_log_density(train[kept], component[kept], x),
            densities.mixture_influence(train, component, x),
        ),
    }
    rows: list[Row] = []
    for name, (log_density, influence) in learners.items():
        exact = refit(train, log_density, log_density(torch.arange(count)))
        own = influence[:queries].argmax(1) == torch.arange(queries)
        rows.append(
            {
                "density": name,
                "train": count,
                "error": float((influence - exact).abs().max()),
                "largest": float(exact.abs().max()),
                "own_strongest": float(own.double().mean()),
            }
        )
    return rows


def trained(x: Tensor, epochs: int, seed: int, **options: Any) -> tuple[fastvae.VAE, fastvae.History]:
    """A small dense beta-VAE after so many epochs on images [N, ...]."""
    torch.manual_seed(seed)
    size = x[0].numel()
    encoder = nn.Sequential(nn.Flatten(), nn.Linear(size, 64), nn.ReLU(), nn.Linear(64, 2 * LATENTS))
    decoder = nn.Sequential(nn.Linear(LATENTS, 64), nn.ReLU(), nn.Linear(64, size))
    model = fastvae.VAE(encoder, decoder, beta=4.0)
    loader = DataLoader(TensorDataset(x), 64, shuffle=True)
    return model, fastvae.fit(model, loader, epochs=epochs, seed=seed, progress=False, **options)


class GivenNoise(nn.Module):
    """The mean loss over noise [B, S, d] that comes with the batch: the same under every checkpoint."""

    def __init__(self, model: fastvae.VAE) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor, noise: Tensor) -> Tensor:
        draws = noise.shape[1]
        losses = self.model(x.repeat_interleave(draws, 0), noise=noise.flatten(0, 1)[None])
        return losses.view(-1, draws).mean(1)


def common_noise(
    model: fastvae.VAE, x: Tensor, own: Tensor, checkpoints: Sequence[Any], draws: int, seed: int
) -> Tensor:
    """[M] the strongest proponents of x[own] with the same draws at every checkpoint."""

    def batch(x: Tensor, seed: int) -> tuple[Tensor, Tensor, Tensor]:
        noise = Stream(draws_of(keys_of(x), seed, draws)).normal((LATENTS,))
        return x, noise.view(len(x), draws, LATENTS).to(x), x.new_zeros(len(x))

    tracin = TracIn(
        GivenNoise(model),
        batch(x, seed),
        checkpoints,
        lambda given, file: load_checkpoint(given.model, file),
        loss_fn=lambda losses, _: losses,
    )
    return tracin.influence(batch(x[own], seed + 1), k=1)[0][:, 0]


def checkpoint_noise(x: Tensor, arguments: argparse.Namespace) -> list[Row]:
    """The share of training images that are their own strongest proponent, for each number of checkpoints.

    Independent noise on both sides: the same at every checkpoint, or fresh at each. Errors are standard errors over
    the seeds of the noise.
    """
    most, draws = max(arguments.checkpoints), min(arguments.draws)
    every = max(1, arguments.epochs // most)
    generator = torch.Generator().manual_seed(arguments.seed)
    own = torch.randperm(len(x), generator=generator)[: 2 * arguments.pairs]
    rows: list[Row] = []
    folder = arguments.checkpoint
    model, history = trained(x, every * most, arguments.seed, run_dir=folder / "run", checkpoint_every=every)
    for count in arguments.checkpoints:
        chosen = [history.checkpoints[most * (i + 1) // count - 1] for i in range(count)]

        def shares_of(seed: int, chosen: Sequence[Any] = tuple(chosen)) -> Row:
            tracin = TracIn(model, x, chosen, num_samples=draws, seed=seed, query_seed=seed + 1)
            found = {
                "common": common_noise(model, x, own, chosen, draws, seed),
                "fresh": tracin.influence(x[own], k=1)[0][:, 0],
            }
            return {name: float((indices == own).double().mean()) for name, indices in found.items()}

        each = [
            stored(folder / f"noise-{count}-{seed}.json", {}, functools.partial(shares_of, seed))
            for seed in range(0, 2 * arguments.trials, 2)
        ]
        row: Row = {"checkpoints": count}
        for name in ("common", "fresh"):
            shares = [found[name] for found in each]
            error = stdev(shares) / math.sqrt(len(shares)) if len(shares) > 1 else None
            row |= {name: mean(shares), f"{name}_error": error}
        rows.append(row)
    return rows


def sampling_error(x: Tensor, arguments: argparse.Namespace) -> list[Row]:
    """The error of VAE-TracIn with S draws, as a share of the scores' size, for each S."""
    model, _ = trained(x, arguments.epochs, arguments.seed)
    train, queries = x[: arguments.pairs], x[-arguments.pairs :]

    def scores(draws: int, seed: int) -> Tensor:
        tracin = TracIn(
            model, train, [None], lambda *_: 1.0, num_samples=draws, seed=seed, query_seed=seed + 1
        )
        found = tracin.influence(queries)
        assert isinstance(found, Tensor)
        return found.double()

    truth = scores(arguments.reference, 10**6)
    rows: list[Row] = []
    for draws in arguments.draws:
        errors = [scores(draws, 2 * trial) - truth for trial in range(arguments.trials)]
        squared = torch.stack(errors).square().mean()
        rows.append({"draws": draws, "error": float(squared.sqrt() / truth.square().mean().sqrt())})
    return rows


def slope(rows: Sequence[Row], x: str, y: str) -> float:
    """Of the line through (log x, log y), by least squares."""
    at, values = (torch.tensor([math.log(row[key]) for row in rows], dtype=torch.float64) for key in (x, y))
    at = at - at.mean()
    return float((at * (values - values.mean())).sum() / at.square().sum())
