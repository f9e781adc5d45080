"""Decoders whose gradients are their own: custom autograd.Functions, detach and no_grad inside forward."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastvae.likelihoods import Gaussian

from .entry import Entry


class Round(torch.autograd.Function):
    """Rounded forward, the identity backward (a straight-through estimator)."""

    @staticmethod
    def forward(ctx: Any, h: Tensor) -> Tensor:
        return torch.round(4 * h) / 4

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


class Swish(torch.autograd.Function):
    """The memory-saving Swish of many repositories: a true gradient, written by hand."""

    @staticmethod
    def forward(ctx: Any, h: Tensor) -> Tensor:
        ctx.save_for_backward(h)
        return h * torch.sigmoid(h)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (h,) = ctx.saved_tensors
        s = torch.sigmoid(h)
        return grad * (s * (1 + h * (1 - s)))


class WithFunction(nn.Module):
    """A custom Function between two layers."""

    def __init__(self, width: int, function: type[torch.autograd.Function]) -> None:
        super().__init__()
        h = 24 * width
        self.function = function
        self.inp, self.mid, self.out = nn.Linear(4, h), nn.Linear(h, h), nn.Linear(h, 30)

    def forward(self, z: Tensor) -> Tensor:
        h = self.function.apply(torch.tanh(self.inp(z)))
        return self.out(torch.tanh(self.mid(h)))


class Quantised(nn.Module):
    """The nearest entries of a codebook, straight through by detach (van den Oord et al. 2017)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.codebook = nn.Embedding(9, 2)
        self.fc1, self.fc2 = nn.Linear(6, 24 * width), nn.Linear(24 * width, 30)

    def forward(self, z: Tensor) -> Tensor:
        h = z.view(len(z), -1, 2)
        nearest = (h[:, :, None] - self.codebook.weight).square().sum(-1).argmin(-1)
        h = h + (self.codebook(nearest) - h).detach()
        return self.fc2(F.gelu(self.fc1(h.flatten(1))))


class Detached(nn.Module):
    """A statistic under no_grad, and a gate that is detached."""

    def __init__(self, width: int) -> None:
        super().__init__()
        h = 24 * width
        self.inp, self.gate, self.out = nn.Linear(4, h), nn.Linear(4, h), nn.Linear(h, 30)

    def forward(self, z: Tensor) -> Tensor:
        h = self.inp(z)
        with torch.no_grad():
            size = h.square().mean(1, keepdim=True).add(1e-3).sqrt()
        return self.out(torch.tanh(h / size) * torch.sigmoid(self.gate(z)).detach())


ENTRIES = [
    Entry(
        "straight-through",
        lambda w: WithFunction(w, Round),
        (4,),
        Gaussian(0.5),
        own_gradients="rounding passes its gradient straight through",
    ),
    Entry("swish-function", lambda w: WithFunction(w, Swish), (4,), Gaussian(0.5)),
    Entry(
        "codebook",
        Quantised,
        (6,),
        Gaussian(0.5),
        own_gradients="quantising passes its gradient straight through",
    ),
    Entry(
        "no-grad-and-detach",
        Detached,
        (4,),
        Gaussian(0.5),
        own_gradients="no_grad and detach drop a part of it",
    ),
]
