"""log p(x | params) of independent elements by one kernel, and its gradient by the residual that it leaves.

PyTorch's operators pass over params 8 to 40 times, and keep most of what they find.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

from fastvae._extension import has_kernels_for
from fastvae.decoding import is_unobserved
from fastvae.likelihoods.base import Likelihood
from fastvae.likelihoods.learned import LearnedLikelihood
from fastvae.likelihoods.weights import expanded
from fastvae.lowering.checks import has_hooks

__all__ = ["base_measure", "fused_log_prob", "relative_log_prob"]


def fused_log_prob(
    likelihood: Likelihood, params: Tensor, x: Tensor, weight: Tensor | None = None
) -> Tensor | None:
    """``likelihood.log_prob``: [B], as often differentiable with respect to params; None where no kernel gives it.

    Args:
        likelihood: with parameters of its own or without.
        params, x, weight: as of ``Likelihood.log_prob``.
    """
    if not (is_unobserved(params) and is_unobserved(x)) or (torch.is_grad_enabled() and x.requires_grad):
        return None
    owner = type(likelihood).__name__
    own = None if weight is None else expanded(owner, weight, x)
    terms = _terms(likelihood, params, x, own)
    if terms is None:
        return None
    density, params, *_ = terms
    needs_gradient = torch.is_grad_enabled() and params.requires_grad
    found = _LogProb.apply(*terms, x) if needs_gradient else _call(*terms, False)[0]
    base = density.base_measure(x, found.dtype, own)
    return found if base is None else found + base


def relative_log_prob(
    likelihood: Likelihood, params: Tensor, x: Tensor, weight: Tensor | None
) -> Tensor | None:
    """The same without ``base_measure`` and without a gradient."""
    terms = _terms(likelihood, params, x, weight)
    return None if terms is None else _call(*terms, False)[0]


def base_measure(
    likelihood: Likelihood, x: Tensor, dtype: torch.dtype, weight: Tensor | None
) -> Tensor | None:
    """What ``relative_log_prob`` leaves out: [B], or None if it is nothing."""
    density = likelihood.head if isinstance(likelihood, LearnedLikelihood) else likelihood
    return density.base_measure(x, dtype, weight)


def _terms(
    likelihood: Likelihood, params: Tensor, x: Tensor, weight: Tensor | None
) -> tuple[Likelihood, Tensor, Tensor, Tensor | None] | None:
    """The likelihood without parameters of its own, and what its kernel takes; the weight of the shape of x."""
    if isinstance(likelihood, LearnedLikelihood):
        if has_hooks(likelihood) or type(likelihood) is not LearnedLikelihood:
            return None
        params, likelihood = likelihood._appended(params), likelihood.head
    if not (likelihood.has_element_kernel and has_kernels_for(params)):
        return None
    likelihood._match(params, x)  # says what does not fit
    data = likelihood._element_data(x.detach(), params.dtype)
    return likelihood, params, data, None if weight is None else weight.to(params.dtype)


def _call(
    likelihood: Likelihood, params: Tensor, data: Tensor, weight: Tensor | None, wants_residual: bool
) -> tuple[Tensor, Tensor]:
    text = likelihood.element_spec
    found: tuple[Tensor, Tensor] = torch.ops.fastvae_internal.element_head(
        params.detach(), data, weight, text, wants_residual
    )
    return found


class _LogProb(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: FunctionCtx,
        likelihood: Likelihood,
        params: Tensor,
        data: Tensor,
        weight: Tensor | None,
        x: Tensor,
    ) -> Tensor:
        log_px, residual = _call(likelihood, params, data, weight, True)
        ctx.likelihood = likelihood  # type: ignore[attr-defined]
        ctx.save_for_backward(params, x, residual, weight)  # type: ignore[arg-type]
        return log_px

    @staticmethod
    def backward(ctx: Any, of_log_px: Tensor) -> tuple[Tensor | None, ...]:
        params, x, residual, weight = ctx.saved_tensors
        if not torch.is_grad_enabled():
            return None, residual * of_log_px.reshape(-1, *[1] * (params.dim() - 1)), None, None, None
        # Of a gradient with a graph, by autograd.
        log_px = ctx.likelihood.log_prob(params, x, weight)
        return None, *torch.autograd.grad(log_px, params, of_log_px, create_graph=True), None, None, None
