"""The small operators in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

ROWS = 64
"""samples whose gradients are materialised at once"""


def kick_drift(z: Tensor, rho: Tensor, force: Tensor, step_size: Tensor) -> tuple[Tensor, ...]:
    """Two passes, each one fused multiplication and addition."""
    rho_half = torch.addcmul(rho, step_size, force, value=0.5)
    return torch.addcmul(z, step_size, rho_half), rho_half


def kick_temper(rho_half: Tensor, force: Tensor, step_size: Tensor, alpha: Tensor) -> Tensor:
    return alpha * torch.addcmul(rho_half, step_size, force, value=0.5)


def distributions_kl(mu: Tensor, logvar: Tensor) -> Tensor:
    posterior = torch.distributions.Normal(mu, torch.exp(0.5 * logvar))
    prior = torch.distributions.Normal(torch.zeros_like(mu), torch.ones_like(mu))
    return torch.distributions.kl_divergence(posterior, prior).sum(1)


def materialised(h_a: Tensor, delta_a: Tensor, h_b: Tensor, delta_b: Tensor) -> Tensor:
    """Per-sample gradients of weight and bias, ROWS samples of the first set at a time, and their products."""

    def gradients(h: Tensor, delta: Tensor) -> Tensor:
        return torch.cat([torch.einsum("nto,nti->noi", delta, h).flatten(1), delta.sum(1)], 1)

    others = gradients(h_b, delta_b).T
    parts = zip(h_a.split(ROWS), delta_a.split(ROWS), strict=True)
    return torch.cat([gradients(h, delta) @ others for h, delta in parts])
