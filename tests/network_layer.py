"""Networks around layers of fastvae.network, one at a time or several side by side."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from layer_kinds import Call, draw_statistics
from torch import Tensor, nn


class Case(NamedTuple):
    """A layer on a sample of some shape, the operators that torch.export must have made of it, and those left over."""

    make: Callable[[], nn.Module]
    shape: tuple[int, ...]
    takes: tuple[str, ...]
    by_autograd: tuple[str, ...] = ()


def call(function: Callable[..., Tensor], shape: tuple[int, ...], *takes: str, held: tuple = ()) -> Case:
    """A function of h and of parameters of the shapes in ``held``."""
    return Case(lambda: Call(function, *(Held(size) for size in held)), shape, takes)


def left_over(function: Callable[..., Tensor], shape: tuple[int, ...], *names: str) -> Case:
    """A function with operators that have no rule."""
    return Case(lambda: Call(function), shape, (), names)


def layer(make: Callable[[], nn.Module], shape: tuple[int, ...], *takes: str) -> Case:
    return Case(make, shape, takes)


class Held(nn.Module):
    """One parameter; called, it is that."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.tensor = nn.Parameter(torch.randn(shape))

    def forward(self) -> Tensor:
        return self.tensor


def frozen(module: nn.Module, name: str) -> nn.Module:
    getattr(module, name).requires_grad_(False)
    return module


class Branches(nn.Module):
    """A Linear layer, tanh, and several layers on samples of one shape, their outputs side by side."""

    def __init__(self, cases: Sequence[Case]) -> None:
        super().__init__()
        self.shape = cases[0].shape
        self.first = nn.Linear(3, torch.Size(self.shape).numel())
        self.layers = nn.ModuleList(case.make() for case in cases)

    def forward(self, z: Tensor) -> Tensor:
        h = torch.tanh(self.first(z)).unflatten(1, self.shape)
        return torch.cat([layer(h).flatten(1) for layer in self.layers], 1)


def network_of(*cases: Case) -> nn.Module:
    """In float64 and eval mode, the running statistics drawn."""
    torch.manual_seed(0)
    module = Branches(cases).double().eval()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
        draw_statistics(module)
    return module
