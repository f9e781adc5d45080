"""Calls of the two leapfrog operators, for the tests that share them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fastvae import ops

OPS = ("leapfrog_kick_drift", "leapfrog_kick_temper")
each_op = pytest.mark.parametrize("name", OPS)


def inputs(
    name: str,
    step_shape: tuple[int, ...] = (3,),
    batch: int = 4,
    dim: int = 3,
    dtype: torch.dtype = torch.float64,
) -> list[Tensor]:
    """The tensors of one call on the CPU."""
    generator = torch.Generator().manual_seed(0)
    states = 3 if name == "leapfrog_kick_drift" else 2
    tensors = [torch.randn(batch, dim, generator=generator, dtype=torch.float64) for _ in range(states)]
    tensors.append(0.1 + torch.rand(step_shape, generator=generator, dtype=torch.float64))
    if name == "leapfrog_kick_temper":
        tensors.append(torch.tensor(0.8, dtype=torch.float64))
    return [t.to(dtype) for t in tensors]


def function(name: str, module: object = ops) -> Callable[..., tuple[Tensor, ...]]:
    """Always a tuple."""
    op = getattr(module, name)

    def call(*args: object) -> tuple[Tensor, ...]:
        out = op(*args)
        return out if isinstance(out, tuple) else (out,)

    return call


def leaves(
    tensors: list[Tensor], device: torch.device | str = "cpu", dtype: torch.dtype | None = None
) -> list[Tensor]:
    return [t.detach().to(device, dtype or t.dtype, copy=True).requires_grad_() for t in tensors]


def value_and_gradients(call: Callable[..., tuple[Tensor, ...]], args: list[Tensor]) -> list[Tensor]:
    out = call(*args)
    generator = torch.Generator().manual_seed(1)
    cotangents = [torch.randn(o.shape, generator=generator, dtype=torch.float64).to(o) for o in out]
    return [*out, *torch.autograd.grad(out, args, cotangents)]
