"""The oracle against central differences in float64, through every kind of layer of torch.nn."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from layer_kinds import LAYERS, decoder
from torch import Tensor, nn

from fastvae import reference
from fastvae.likelihoods import Gaussian

# Central differences of step 1e-6 are good to 1e-12 in what they leave out and to about 1e-9 in rounding.
STEP, TOLERANCE = 1e-6, 1e-7

each_layer = pytest.mark.parametrize("name", LAYERS)


def codes(batch: int = 2) -> Tensor:
    return torch.randn(batch, 3, generator=torch.Generator().manual_seed(4), dtype=torch.float64)


def jacobian_by_differences(function: Callable[[Tensor], Tensor], z: Tensor) -> Tensor:
    """[d, B, outputs]."""
    columns = []
    with torch.no_grad():
        for shift in STEP * torch.eye(z.shape[1], dtype=z.dtype):
            columns.append((function(z + shift) - function(z - shift)).flatten(1) / (2 * STEP))
    return torch.stack(columns)


def check_directional(function: Callable[[], Tensor], leaves: Sequence[Tensor]) -> None:
    """The gradient of a number, along random directions of each leaf, against its central differences."""
    value = function()
    gradients = torch.autograd.grad(value, leaves, allow_unused=True, materialize_grads=True)
    generator = torch.Generator().manual_seed(5)
    for leaf, gradient in zip(leaves, gradients, strict=True):
        direction = torch.randn(leaf.shape, generator=generator, dtype=leaf.dtype)
        ends = []
        with torch.no_grad():
            for sign in (1, -1):
                leaf.add_(direction, alpha=sign * STEP)
                ends.append(function())
                leaf.sub_(direction, alpha=sign * STEP)
        difference = (ends[0] - ends[1]) / (2 * STEP)
        scale = difference.abs() + gradient.norm() * direction.norm() + 1e-2
        error = (difference - (gradient * direction).sum()).abs()
        assert error <= TOLERANCE * scale, f"{tuple(leaf.shape)}: off by {error:.1e} of {difference:.1e}"


def leaves_of(module: nn.Module, *tensors: Tensor) -> list[Tensor]:
    return [tensor.requires_grad_() for tensor in tensors] + list(module.parameters())


OPTIONS: dict[str, dict[str, Any]] = {
    "l1": {},
    "sigmoid": {"output": "sigmoid", "latents": [2, 0]},
    "squares": {"p": 2},
}


@pytest.mark.parametrize("options", OPTIONS)
@each_layer
def test_jacobian(name: str, options: str) -> None:
    module, z = decoder(name), codes()
    arguments = OPTIONS[options]
    squash = torch.sigmoid if arguments.get("output") == "sigmoid" else torch.nn.Identity()
    columns = jacobian_by_differences(lambda point: squash(module(point)), z)
    terms = columns[arguments.get("latents", slice(None))].abs().pow(arguments.get("p", 1)).sum((0, 2))
    value = reference.jacobian_l1(module, z, "none", **arguments)
    torch.testing.assert_close(value.detach(), terms, rtol=1e-7, atol=1e-7)
    weights = torch.tensor([1.0, 0.4], dtype=torch.float64)
    check_directional(
        lambda: (reference.jacobian_l1(module, z, "none", **arguments) * weights).sum(), leaves_of(module, z)
    )


@each_layer
def test_flow(name: str) -> None:
    module, z = decoder(name), codes()
    rho = torch.randn(2, 3, generator=torch.Generator().manual_seed(6), dtype=torch.float64)
    x = module(z).detach() + 0.3
    eps = torch.tensor([[0.1], [0.2]], dtype=torch.float64)
    alpha = torch.tensor([0.9, 0.8], dtype=torch.float64)

    # The first half step, by a force from differences of log p(x, z).
    def joint(point: Tensor) -> Tensor:
        return (Gaussian(0.5).log_prob(module(point), x) - point.square().sum(1) / 2)[:, None]

    force = jacobian_by_differences(joint, z)[:, :, 0].T
    with torch.no_grad():
        first = reference.hamiltonian_flow(module, z, rho, x, eps[:1], alpha[:1], Gaussian(0.5))[0]
    torch.testing.assert_close(first, z + 0.1 * (rho + 0.05 * force), rtol=1e-8, atol=1e-8)

    leaves = leaves_of(module, z, rho, eps, alpha)
    weights = torch.randn(2, 3, generator=torch.Generator().manual_seed(7), dtype=torch.float64)

    def ends() -> Tensor:
        z_K, rho_K, log_px = reference.hamiltonian_flow(module, z, rho, x, eps, alpha, Gaussian(0.5))
        return (weights * z_K).sum() - (weights * rho_K).sum() + 0.1 * log_px.sum()

    check_directional(ends, leaves)


@each_layer
def test_log_px(name: str) -> None:
    module, z = decoder(name), codes(4).view(2, 2, 3)
    x = module(z[0]).detach() + 0.3
    found = reference.log_px(module, z, x, Gaussian(0.5))
    for row, draw in zip(found, z, strict=True):
        torch.testing.assert_close(row, Gaussian(0.5).log_prob(module(draw), x), rtol=1e-12, atol=1e-12)
    check_directional(lambda: reference.log_px(module, z, x, Gaussian(0.5)).sum(), leaves_of(module, z))
