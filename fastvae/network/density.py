"""A likelihood read as a network of its own: from a decoder's output to log p(x | y), swept like any network.

So a density in plain PyTorch needs no autograd at each point of a flow, and what depends on the data alone, such as a
factorial, is computed once a call.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastvae._compiling import is_captured
from fastvae.likelihoods import Likelihood
from fastvae.locks import READING
from fastvae.lowering.errors import UnsupportedLayer
from fastvae.network.facts import key_of
from fastvae.network.layers import Products, registrations
from fastvae.network.pristine import Pristine
from fastvae.network.reading import read_program
from fastvae.network.sweeps import Inputs, Sweeps
from fastvae.network.tape import outside

__all__ = ["density_of", "tensors_of"]

_REMEMBERED = 32
_TOLERANCE = {torch.float64: 1e-8, torch.float32: 2e-3}
_known: OrderedDict[Any, Any] = OrderedDict()
"""Sweeps or None."""
_UNKNOWN = object()

Derivatives = Callable[[Tensor, Tensor, Tensor], Sequence[Tensor | None]]
"""Of y, a direction v and cotangents c of log p: log p, its gradient r, and the gradient of <r, v> + <c, log p>."""


class _Density(nn.Module):
    """log p(x | y) as a module of y and x."""

    def __init__(self, likelihood: Likelihood) -> None:
        super().__init__()
        self.likelihood = likelihood

    def forward(self, y: Tensor, x: Tensor) -> Tensor:
        """[B]."""
        of = self.likelihood.log_prob if self.likelihood.probs else self.likelihood.log_prob_of_output
        return of(y, x)


def density_of(likelihood: Likelihood, y: Tensor, x: Tensor, by_autograd: Derivatives) -> Sweeps | None:
    """The sweeps of a likelihood's density for outputs like y and data like x [B, ...], read at the first call.

    None: it cannot be read, holds what no rule of ours knows, or is at y and x something else than ``by_autograd``
    says.
    """
    of_likelihood = key_of(likelihood)
    if of_likelihood is None or y.dtype not in _TOLERANCE or not len(y):
        return None
    forms = tuple((tensor.dtype, tensor.device, tensor.shape[1:]) for tensor in (y, x))
    key = of_likelihood, forms, torch.get_default_dtype(), registrations()
    found = _known.get(key, _UNKNOWN)
    if found is not _UNKNOWN:
        return found
    with READING:
        if key not in _known:
            if is_captured(y):
                return None
            found = outside(_read, likelihood, y, x, by_autograd)
            if len(_known) >= _REMEMBERED:
                _known.popitem(last=False)
            _known[key] = found
        return _known[key]


@torch.inference_mode(False)
def _read(likelihood: Likelihood, y: Tensor, x: Tensor, by_autograd: Derivatives) -> Sweeps | None:
    try:
        program = read_program(Pristine(_Density(likelihood), y, x, is_own=True))
    except UnsupportedLayer:
        return None
    if program.turns or program.is_aligned or not program.is_active[program.output]:
        return None
    sweeps = Sweeps(program, y.device.type)
    if sweeps.by_autograd:
        return None
    # A sample alone, too: nothing may depend on the others.
    for rows in (slice(None), slice(0, 1)):
        if not _agree(sweeps, y[rows], x[rows], by_autograd):
            return None
    return sweeps


def _agree(sweeps: Sweeps, y: Tensor, x: Tensor, by_autograd: Derivatives) -> bool:
    generator = torch.Generator().manual_seed(0)
    v, c = (torch.randn(shape, generator=generator, device="cpu").to(y) for shape in (y.shape, y.shape[:1]))
    try:
        with torch.no_grad():
            inputs = Inputs(sweeps, y, tensors_of(sweeps, x))
            passive = inputs.detached()
            sweeps.measure(passive, y)
            at = sweeps.forward(passive, y, inputs.wanted)
            log_px = sweeps.output(at)
            r, cotangents = sweeps.reverse(at, torch.ones_like(log_px))
            products = Products(passive, inputs.wanted, {})
            found = sweeps.adjoint(at, sweeps.tangent(at, v), cotangents, None, products).get(0)
            if r is not None:
                # Of what depends on the other samples it would not be that.
                of_log_px = r * c.reshape(-1, *[1] * (y.dim() - 1))
                found = of_log_px if found is None else found + of_log_px
    except (RuntimeError, ValueError, TypeError, NotImplementedError):
        return False
    wanted = by_autograd(y, v, c)
    near = _TOLERANCE[y.dtype]
    for mine, theirs in zip((log_px, r, found), wanted, strict=True):
        a = torch.zeros_like(y) if mine is None else mine
        b = torch.zeros_like(y) if theirs is None else theirs
        if a.shape != b.shape or a.dtype != b.dtype or not bool(b.isfinite().all()):
            return False
        if not torch.allclose(a, b, rtol=near, atol=near * float(b.abs().max())):
            return False
    return True


def tensors_of(sweeps: Sweeps, x: Tensor) -> list[Tensor | None]:
    """The density's tensors by source: x, and constants."""
    return [x if source.is_condition else source.constant for source in sweeps.program.sources]
