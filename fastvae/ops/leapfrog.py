"""Leapfrog updates for any potential: the two halves of a tempered step, fused, with their gradients."""

from __future__ import annotations

import torch
from torch import Tensor

from fastvae.ops._registration import (
    cast_under_autocast,
    check_one_device,
    float32_under_autocast,
    refuse_function_transforms,
)


def leapfrog_kick_drift(
    z: Tensor, rho: Tensor, force: Tensor, step_size: Tensor | float
) -> tuple[Tensor, Tensor]:
    """First half of a leapfrog step: a half kick of the momentum, then the drift of the position.

        rho_half = rho + step_size / 2 * force,    z_next = z + step_size * rho_half

    Caterini, Doucet, Sejdinovic, Hamiltonian Variational Auto-Encoder, NeurIPS 2018, algorithm 1.

    Args:
        z: position [B, d], float32 or float64, CPU or CUDA.
        rho: momentum [B, d].
        force: grad_z log p(x, z) at z, [B, d] (minus the gradient of the potential energy).
        step_size: a number, a tensor of one element, or [d].

    Returns:
        z_next [B, d] and rho_half [B, d]; differentiable once in every tensor argument.

    Raises:
        ValueError: shapes or devices that do not fit together.
        TypeError: dtypes other than float32 and float64, or mixed.
    """
    refuse_function_transforms("leapfrog_kick_drift", z)
    z = float32_under_autocast(z)
    return torch.ops.fastvae.leapfrog_kick_drift(z, rho, force, _as_tensor(step_size, z))


def leapfrog_kick_temper(
    rho_half: Tensor, force: Tensor, step_size: Tensor | float, alpha: Tensor | float
) -> Tensor:
    """Second half of a leapfrog step: a half kick by the force at the new position, then tempering.

        rho_next = alpha * (rho_half + step_size / 2 * force)

    Caterini, Doucet, Sejdinovic, Hamiltonian Variational Auto-Encoder, NeurIPS 2018, algorithm 1. The
    force is also the one that the next step starts with: K steps need K + 1 forces.

    Args:
        rho_half: momentum [B, d] from :func:`leapfrog_kick_drift`, float32 or float64, CPU or CUDA.
        force: grad_z log p(x, z) at the new position, [B, d].
        step_size: a number, a tensor of one element, or [d].
        alpha: tempering factor, a number or a tensor of one element (1: none).

    Returns:
        rho_next [B, d]; differentiable once in every tensor argument.

    Raises:
        ValueError: shapes or devices that do not fit together.
        TypeError: dtypes other than float32 and float64, or mixed.
    """
    refuse_function_transforms("leapfrog_kick_temper", rho_half)
    rho_half = float32_under_autocast(rho_half)
    return torch.ops.fastvae.leapfrog_kick_temper(
        rho_half, force, _as_tensor(step_size, rho_half), _as_tensor(alpha, rho_half)
    )


def _as_tensor(value: Tensor | float, like: Tensor) -> Tensor:
    return value if isinstance(value, Tensor) else torch.full((), value, dtype=like.dtype, device=like.device)


@torch.library.register_fake("fastvae::leapfrog_kick_drift")
def _(z: Tensor, rho: Tensor, force: Tensor, step_size: Tensor) -> tuple[Tensor, Tensor]:
    check_one_device("leapfrog_kick_drift", z, "z", rho=rho, force=force, step_size=step_size)
    return z.new_empty(z.shape), z.new_empty(z.shape)


@torch.library.register_fake("fastvae::leapfrog_kick_drift_backward")
def _(
    grad_z_next: Tensor, grad_rho_half: Tensor, z: Tensor, rho: Tensor, force: Tensor, step_size: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    check_one_device(
        "leapfrog_kick_drift_backward",
        z,
        "z",
        grad_z_next=grad_z_next,
        grad_rho_half=grad_rho_half,
        rho=rho,
        force=force,
        step_size=step_size,
    )
    return z.new_empty(z.shape), z.new_empty(z.shape), z.new_empty(z.shape), z.new_empty(step_size.shape)


@torch.library.register_fake("fastvae::leapfrog_kick_temper")
def _(rho_half: Tensor, force: Tensor, step_size: Tensor, alpha: Tensor) -> Tensor:
    check_one_device(
        "leapfrog_kick_temper", rho_half, "rho_half", force=force, step_size=step_size, alpha=alpha
    )
    return rho_half.new_empty(rho_half.shape)


@torch.library.register_fake("fastvae::leapfrog_kick_temper_backward")
def _(
    grad_rho_next: Tensor, rho_half: Tensor, force: Tensor, step_size: Tensor, alpha: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    check_one_device(
        "leapfrog_kick_temper_backward",
        rho_half,
        "rho_half",
        grad_rho_next=grad_rho_next,
        force=force,
        step_size=step_size,
        alpha=alpha,
    )
    new = rho_half.new_empty
    return new(rho_half.shape), new(rho_half.shape), new(step_size.shape), new(alpha.shape)


for _name in ("leapfrog_kick_drift", "leapfrog_kick_temper"):
    cast_under_autocast(_name)
