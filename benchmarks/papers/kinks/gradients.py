"""How far estimators of the mean penalty's gradient are off, and how noisy they are."""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from fastvae.ops import jacobian_l1

from ...networks import mlp
from ..shared import Row

ESTIMATORS: dict[str, dict[str, Any]] = {
    "exact": {},
    "difference, step 0.1": {"estimator": "difference", "step": 0.1},
    "difference, step 0.01": {"estimator": "difference", "step": 0.01},
    "difference, step 0.001": {"estimator": "difference", "step": 0.001},
}
ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {"ReLU": nn.ReLU, "Softplus": nn.Softplus}
WIDTHS = (4, 32, 32, 20)
SHARE = 0.02
"""By which weights are moved for the derivative of the mean, of their own root mean square."""
CHUNK = 4096
BATCH = 64


def codes(count: int, seed: int) -> Iterator[Tensor]:
    """Standard normal codes, the same for one seed, in chunks."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(count // CHUNK):
        yield torch.randn(CHUNK, WIDTHS[0], generator=generator, dtype=torch.float64)


def derivative_of_mean(decoder: nn.Module, direction: list[Tensor], count: int, seed: int) -> float:
    """Of the mean penalty over codes, along a direction in parameter space, by central differences of the mean.

    With the codes in common; what single samples have no gradient for is in their mean.
    """
    means = []
    for sign in (1, -1):
        moved = copy.deepcopy(decoder)
        with torch.no_grad():
            for parameter, along in zip(moved.parameters(), direction, strict=True):
                parameter.add_(along, alpha=sign * SHARE)
            means.append(sum(float(jacobian_l1(moved, z, "sum")) for z in codes(count, seed)) / count)
    return (means[0] - means[1]) / (2 * SHARE)


def gradient(decoder: nn.Module, z: Tensor, options: dict[str, Any]) -> list[Tensor]:
    parameters = list(decoder.parameters())
    value = jacobian_l1(decoder, z, **options)
    return list(torch.autograd.grad(value, parameters, allow_unused=True, materialize_grads=True))


def along(gradients: list[Tensor], directions: list[list[Tensor]]) -> Tensor:
    """[directions]."""
    flat = torch.cat([part.flatten() for part in gradients])
    return torch.stack([torch.cat([part.flatten() for part in each]) @ flat for each in directions])


def rms(values: Tensor) -> float:
    return float(values.square().mean().sqrt())


def compared(activation: str, arguments: argparse.Namespace) -> list[Row]:
    """Bias over directions, and noise of a batch of 64, as shares of the derivative of the mean."""
    torch.manual_seed(arguments.seed)
    decoder = mlp(*WIDTHS, activation=ACTIVATIONS[activation]).double()
    directions = [
        [torch.randn_like(parameter) * rms(parameter.detach()) for parameter in decoder.parameters()]
        for _ in range(arguments.directions)
    ]
    truth = torch.tensor(
        [derivative_of_mean(decoder, each, arguments.codes, arguments.seed + 1) for each in directions],
        dtype=torch.float64,
    )
    rows: list[Row] = []
    for name, options in ESTIMATORS.items():
        found = [
            along(gradient(decoder, z, options), directions)
            for z in codes(arguments.codes, arguments.seed + 2)
        ]
        batches = next(codes(CHUNK, arguments.seed + 3)).split(BATCH)
        single = torch.stack([along(gradient(decoder, z, options), directions) for z in batches])
        rows.append(
            {
                "activation": activation,
                "estimator": name,
                "bias": rms(torch.stack(found).mean(0) - truth) / rms(truth),
                "sampling": rms(single.std(0)) * (BATCH / arguments.codes) ** 0.5 / rms(truth),
                "noise": rms(single.std(0)) / rms(truth),
            }
        )
    return rows
