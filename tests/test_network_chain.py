"""A forward that torch.fx cannot trace reaches the kernels all the same where it is a chain of layers."""

from __future__ import annotations

import random

import pytest
import torch
from flow_problems import assert_near
from fuzzing.decoders import draw_module
from torch import Tensor, nn

from fastvae import Network, reference
from fastvae.lowering import LoweredNetwork, UnsupportedLayer, lower
from fastvae.ops import hamiltonian_flow, jacobian_l1
from fastvae.ops._registration import lower_or_read

FUZZED = 16


class Asserting(nn.Module):
    """A forward that asks for sizes before it calls layers, as those of packages do."""

    def __init__(self, layers: nn.Module) -> None:
        super().__init__()
        self.layers = layers

    def forward(self, z: Tensor) -> Tensor:
        assert z.ndim == 2
        if z.size(1) > 1000:
            raise ValueError("too many latents")
        return self.layers(z)


class Computing(nn.Module):
    """Weights that are computed in the forward, one of them twice the same."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(5, 3))
        self.scale = nn.Parameter(torch.rand(5) + 0.5)
        self.out = nn.Linear(5, 6)

    def forward(self, z: Tensor) -> Tensor:
        weight = self.scale[:, None] * self.weight
        h = torch.tanh(nn.functional.linear(z, weight))
        h = torch.tanh(nn.functional.linear(nn.functional.linear(h, weight.t()), weight))
        return self.out(h)


class Parts(nn.Module):
    """Two equal moves of one tensor at a code of zeros, which differ elsewhere."""

    def __init__(self) -> None:
        super().__init__()
        self.out = nn.Linear(2, 4)

    def forward(self, z: Tensor) -> Tensor:
        assert z.ndim == 2
        return self.out(z[:, :2]) + self.out(z[:, 1:])


def convolutional() -> nn.Module:
    return nn.Sequential(
        nn.Linear(3, 8),
        nn.ELU(0.7),
        nn.Unflatten(1, (4, 1, 2)),
        nn.ConvTranspose2d(4, 6, 3, 2, 1, 1, groups=2, dilation=1),
        nn.BatchNorm2d(6, eps=1e-3),
        nn.GELU(approximate="tanh"),
        nn.Conv2d(6, 3, (3, 2), (1, 2), (1, 0), groups=3, bias=False),
        nn.Softplus(2.0, 5.0),
        nn.Dropout(0.3),
        nn.Flatten(),
    )


def volume() -> nn.Module:
    return nn.Sequential(
        nn.Linear(3, 24), nn.Unflatten(1, (2, 2, 3, 2)), nn.BatchNorm3d(2), nn.Tanh(), nn.Unflatten(1, (2, 1))
    )


def results(of_ours: bool, decoder: nn.Module, z: Tensor, x: Tensor, rho: Tensor) -> list[Tensor]:
    """Flow and Jacobian penalty, with their gradients to z and to every parameter."""
    point = z.clone().requires_grad_()
    leaves = [point, *decoder.parameters()]
    alpha = torch.full((3,), 0.9, dtype=z.dtype)
    flow, penalty = (
        (hamiltonian_flow, jacobian_l1) if of_ours else (reference.hamiltonian_flow, reference.jacobian_l1)
    )
    ends = flow(decoder, point, rho, x, 0.05, alpha, "gaussian")[:3]
    total = sum((end * torch.linspace(0.5, 1.5, end.numel()).to(end).view_as(end)).sum() for end in ends)
    size = penalty(decoder, point, "sum", p=2)
    found = []
    for value in (total, size):
        grads = torch.autograd.grad(value, leaves, retain_graph=True, allow_unused=True)
        found += [torch.zeros_like(leaf) if g is None else g for leaf, g in zip(leaves, grads, strict=True)]
    return [*ends, size, *found]


def in_kernels(decoder: nn.Module, z: Tensor) -> bool:
    return isinstance(lower_or_read("hamiltonian_flow", decoder, z, "autograd"), LoweredNetwork)


@pytest.mark.parametrize("make", [lambda: Asserting(convolutional()), lambda: Asserting(volume()), Computing])
def test_a_chain_behind_python_runs_in_kernels_and_agrees(make: type[nn.Module]) -> None:
    torch.manual_seed(0)
    decoder = make().double().eval()
    z, rho = torch.randn(2, 4, 3, dtype=torch.float64)
    with pytest.raises(UnsupportedLayer):
        lower(decoder)
    assert in_kernels(decoder, z)
    x = torch.rand_like(decoder(z)).detach()
    for step in range(2):  # the second time with other parameters
        for ours, theirs in zip(
            results(True, decoder, z, x, rho), results(False, decoder, z, x, rho), strict=True
        ):
            assert_near(ours, theirs, 1e-11)
        with torch.no_grad():
            for parameter in decoder.parameters():
                parameter.add_(0.05 * (step + 1) * torch.randn_like(parameter))
    network = Network(decoder, "gaussian", z=z)
    assert "Run by kernels in hamiltonian_flow and jacobian_l1" in network.explain()
    assert network.lowered == 1
    network.verify(z)


def test_parts_that_are_alike_at_zeros_are_no_chain() -> None:
    torch.manual_seed(0)
    decoder = Parts().double()
    z = torch.zeros(4, 3, dtype=torch.float64)
    assert not in_kernels(decoder, z)
    x, rho = torch.rand(4, 4, dtype=torch.float64), torch.randn(4, 3, dtype=torch.float64)
    for ours, theirs in zip(
        results(True, decoder, z + 1, x, rho), results(False, decoder, z + 1, x, rho), strict=True
    ):
        assert_near(ours, theirs, 1e-11)


def test_a_change_of_the_module_is_read_again() -> None:
    torch.manual_seed(0)
    decoder = Asserting(nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 6))).double()
    z, rho = torch.randn(2, 4, 3, dtype=torch.float64)
    x = torch.rand(4, 6, dtype=torch.float64)
    assert in_kernels(decoder, z)
    decoder.layers[1] = nn.Softplus()  # type: ignore[index, operator]
    for ours, theirs in zip(
        results(True, decoder, z, x, rho), results(False, decoder, z, x, rho), strict=True
    ):
        assert_near(ours, theirs, 1e-11)
    decoder.layers[1] = nn.Hardswish()  # type: ignore[index, operator]
    assert not in_kernels(decoder, z)


@pytest.mark.filterwarnings("ignore:.*this decoder")
def test_random_chains_behind_python_agree() -> None:
    taken = 0
    for seed in range(FUZZED):
        rng = random.Random(seed)
        torch.manual_seed(seed)
        inner = draw_module(rng, 3).double().eval()
        decoder = Asserting(inner)
        z, rho = torch.randn(2, 3, 3, dtype=torch.float64)
        if not decoder(z.clone().requires_grad_()).requires_grad or not in_kernels(decoder, z):
            continue
        taken += 1
        x = torch.rand_like(decoder(z)).detach()
        for ours, theirs in zip(
            results(True, decoder, z, x, rho), results(False, decoder, z, x, rho), strict=True
        ):
            assert_near(ours, theirs, 1e-8)
    assert taken >= FUZZED // 4
