"""Closed forms against refits, and the sampling error of VAE-TracIn."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence

import torch
from shared import Row
from torch import Tensor, nn
from torch.utils.data import DataLoader

import fastvae
from fastvae.influence import TracIn

from . import densities

COMPONENTS = 3
DIM = 2


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


def closed_forms(sizes: Sequence[int], queries: int, seed: int) -> list[Row]:
    """For each density and N: the largest difference to the refits, and who is whose strongest proponent."""
    rows: list[Row] = []
    for count in sizes:
        generator = torch.Generator().manual_seed(seed)
        train, component = points(count, generator)
        x = torch.cat([train[:queries], points(queries, generator)[0]])
        learners: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], Tensor]] = {
            f"{densities.NEIGHBOURS}-NN density": (
                lambda kept, at, t=train: densities.knn_log_density(t[kept], at),
                densities.knn_influence(train, x),
            ),
            "kernel density": (
                lambda kept, at, t=train: densities.kernel_log_density(t[kept], at),
                densities.kernel_influence(train, x),
            ),
            "Gaussian mixture, first order": (
                lambda kept, at, t=train, c=component: densities.mixture_log_density(t[kept], c[kept], at),
                densities.mixture_influence(train, component, x),
            ),
        }
        for name, (log_density, influence) in learners.items():
            everyone = torch.arange(count)
            exact = refit(train, lambda kept, f=log_density, at=x: f(kept, at), log_density(everyone, x))
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


def sampling_error(x: Tensor, arguments: argparse.Namespace) -> list[Row]:
    """The error of VAE-TracIn with S draws, as a share of the scores' size, for each S."""
    torch.manual_seed(arguments.seed)
    size = x[0].numel()
    encoder = nn.Sequential(nn.Flatten(), nn.Linear(size, 64), nn.ReLU(), nn.Linear(64, 16))
    model = fastvae.VAE(encoder, nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, size)), beta=4.0)
    loader = DataLoader(x, 64, shuffle=True)
    fastvae.fit(model, loader, epochs=arguments.epochs, seed=arguments.seed, progress=False)
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
