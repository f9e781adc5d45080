"""SiLU and GELU far out, where they are flat or the identity: float32 against float64."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from jacobian_problems import gradients
from torch import Tensor, nn

from fastvae import ops

SMOOTH: dict[str, Callable[[], nn.Module]] = {
    "silu": nn.SiLU,
    "gelu": nn.GELU,
    "gelu_tanh": lambda: nn.GELU(approximate="tanh"),
}


def jacobian(module: nn.Module, z: Tensor) -> Tensor:
    return ops.jacobian_l1(module, z, "sum")


def flow(module: nn.Module, z: Tensor) -> Tensor:
    x = torch.zeros(len(z), 5, dtype=z.dtype, device=z.device)
    ends = ops.hamiltonian_flow(module, z, torch.zeros_like(z), x, 1e-3, z.new_ones(2), "bernoulli")
    return (ends[0] + ends[1]).sum()


@pytest.mark.parametrize("operator", [jacobian, flow])
@pytest.mark.parametrize("size", [1e4, 1e10, 1e16, 1e20, 1e30])
@pytest.mark.parametrize("activation", SMOOTH)
def test_float32_far_out(
    activation: str, size: float, operator: Callable[..., Tensor], device: torch.device
) -> None:
    """Gradients were wrong by 1e7 and more from |z| = 1e16 on, and not a number from 1e20."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(3, 8), SMOOTH[activation](), nn.Linear(8, 5))
    codes = torch.randn(4, 3) * size
    results = []
    for dtype in (torch.float32, torch.float64):
        module = copy.deepcopy(network).to(device, dtype)
        z = codes.to(device, dtype).requires_grad_()
        value = operator(module, z)
        results.append({"value": value.detach(), **gradients(value, module, z)})
    for name, wanted in results[1].items():
        error = (results[0][name].double() - wanted).norm()
        assert error <= 1e-4 * (wanted.norm() + 1e-3), f"{name}: off by {error:.1e} of {wanted.norm():.1e}"
