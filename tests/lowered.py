"""An interpreter of lowered networks in plain torch, and the small modules that the lowering tests share."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from decoders import DECODERS
from torch import Tensor, nn

from fastvae.lowering import LoweredNetwork, lower

# The interpreter calls the ATen functions that the modules call, in the same order: equal up to the
# rounding of another memory layout.
EXACT = {"rtol": 0.0, "atol": 1e-12}
LOWERED = [name for name, case in DECODERS.items() if case.lowered]


def run_spec(spec: str, tensors: list[Tensor], z: Tensor) -> Tensor:
    """The network of a spec, layer by layer."""
    h = z
    for text in spec.split(";"):
        kind, *words = text.split()

        def tensor(word: str) -> Tensor | None:
            return None if word == "-1" else tensors[int(word)]

        if kind == "linear":
            h = F.linear(h, *map(tensor, words))
        elif kind == "conv2d":
            sh, sw, ph, pw, dh, dw, groups = map(int, words[2:])
            h = F.conv2d(h, *map(tensor, words[:2]), (sh, sw), (ph, pw), (dh, dw), groups)
        elif kind == "conv_transpose2d":
            sh, sw, ph, pw, oph, opw, dh, dw, groups = map(int, words[2:])
            h = F.conv_transpose2d(
                h, *map(tensor, words[:2]), (sh, sw), (ph, pw), (oph, opw), groups, (dh, dw)
            )
        elif kind == "batch_norm":
            weight, bias, mean, var = map(tensor, words[:4])
            h = F.batch_norm(h, mean, var, weight, bias, False, 0.0, float(words[4]))
        elif kind == "reshape":
            h = h.reshape(h.shape[0], *map(int, words))
        elif kind == "gelu_tanh":
            h = F.gelu(h, approximate="tanh")
        elif kind in ("tanh", "sigmoid"):
            h = getattr(torch, kind)(h)
        else:
            h = getattr(F, kind)(h, *map(float, words))
    return h


def check(module: nn.Module, z: Tensor) -> LoweredNetwork:
    network = lower(module)
    torch.testing.assert_close(run_spec(network.spec, network.tensors, z), module(z), **EXACT)
    return network


def latents(dim: int, batch: int = 3, seed: int = 1) -> Tensor:
    return torch.randn(batch, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def mlp() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 5), nn.LeakyReLU(), nn.Linear(5, 3)
    ).double()


class Wrapped(nn.Module):
    """A Linear(4, 6), then whatever function the test is about."""

    def __init__(self, function) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 6)
        self.function = function

    def forward(self, z: Tensor) -> Tensor:
        return self.function(self.fc(z))


def wrapped(function) -> nn.Module:
    torch.manual_seed(0)
    return Wrapped(function).double()
