"""Tempering schedules of the Hamiltonian VAE, and its bounded step size.

A schedule gives the factors alpha [K] on the momentum and the initial inverse temperature beta_0 in (0, 1],
with prod alpha_k = sqrt(beta_0), so that the flow's volume change cancels in the ELBO.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastvae.arguments import expect, expect_numbers

__all__ = ["BoundedStepSize", "Tempering", "fixed_alpha", "fixed_temperature_alpha"]

KINDS = ("free", "fixed", "fixed-temperature", "none")


def fixed_alpha(beta_0: Tensor, num_steps: int) -> Tensor:
    """alpha [K] of the schedule quadratic in 1 / sqrt(beta), from beta_0 [] in (0, 1].

    The fixed tempering of Caterini et al., NeurIPS 2018, with k from 0:
    sqrt(beta_k) = [(1 - 1/sqrt(beta_0)) k^2/K^2 + 1/sqrt(beta_0)]^-1;  alpha_k = sqrt(beta_k / beta_{k+1}).
    """
    k = torch.arange(num_steps + 1, dtype=beta_0.dtype, device=beta_0.device)
    start = beta_0.rsqrt()
    inverse_root = (1 - start) * (k / num_steps).square() + start
    return inverse_root[1:] / inverse_root[:-1]


def fixed_temperature_alpha(beta_0: Tensor, num_steps: int) -> Tensor:
    """alpha [K] of the schedule quadratic in T = 1 / beta, from beta_0 [] in (0, 1].

    That of the MNIST code of Caterini et al., with k from 0:
    T_k = T_0 + (1 - T_0) k^2/K^2;  alpha_k = sqrt(T_{k+1} / T_k).
    """
    k = torch.arange(num_steps + 1, dtype=beta_0.dtype, device=beta_0.device)
    start = beta_0.reciprocal()
    temperature = (1 - start) * (k / num_steps).square() + start
    return (temperature[1:] / temperature[:-1]).sqrt()


class Tempering(nn.Module):
    """The momentum factors of each leapfrog step and the initial inverse temperature.

    Args:
        kind: "free" (each alpha_k = sigmoid of a parameter, beta_0 = prod alpha_k^2), "fixed",
            "fixed-temperature" (schedules of beta_0 = sigmoid of a parameter) or "none" (alpha = 1,
            beta_0 = 1).
        num_steps: K.
        beta_0: initial value, in (0, 1); not used by "none".
        learn: whether its parameters are trained.

    Raises:
        ValueError: an unknown kind, or beta_0 outside (0, 1).
    """

    unit: Tensor

    def __init__(self, kind: str, num_steps: int, beta_0: float, learn: bool) -> None:
        super().__init__()
        expect_numbers("tempering", num_steps=num_steps, beta_0=beta_0)
        expect(kind in KINDS, f"tempering: expected one of {', '.join(KINDS)}", repr(kind))
        if kind != "none" and not 0 < beta_0 < 1:
            raise ValueError(
                f"beta_0: expected a number in (0, 1), got {beta_0}; tempering='none' is beta_0 = 1"
            )
        self.kind = kind
        self.num_steps = num_steps
        if kind == "none":
            self.register_buffer("unit", torch.ones(num_steps), persistent=False)
        elif kind == "free":
            each = torch.full((num_steps,), beta_0 ** (0.5 / num_steps), dtype=torch.float64)
            self.alpha_logit = nn.Parameter(
                torch.logit(each).to(torch.get_default_dtype()), requires_grad=learn
            )
        else:
            start = torch.logit(torch.tensor(beta_0, dtype=torch.float64))
            self.beta_0_logit = nn.Parameter(start.to(torch.get_default_dtype()), requires_grad=learn)

    def forward(self) -> tuple[Tensor, Tensor]:
        """(alpha [K], beta_0 [])"""
        if self.kind == "none":
            return self.unit, self.unit.new_ones(())
        if self.kind == "free":
            # In logarithms, where a product of many small factors would underflow.
            return torch.sigmoid(self.alpha_logit), torch.exp(2 * F.logsigmoid(self.alpha_logit).sum())
        beta_0 = torch.sigmoid(self.beta_0_logit)
        schedule = fixed_alpha if self.kind == "fixed" else fixed_temperature_alpha
        return schedule(beta_0, self.num_steps), beta_0

    def extra_repr(self) -> str:
        """What ``repr`` says of the settings."""
        return f"kind={self.kind!r}, num_steps={self.num_steps}"


class BoundedStepSize(nn.Module):
    """Step sizes in (0, maximum): maximum * sigmoid of a parameter.

    Args:
        initial: number; [d] per dimension; [K] or [K, 1] per step; [K, d]. A one-dimensional value whose
            length is both K and latent_dim, or K while latent_dim is unknown, is ambiguous: pass [K, 1] or
            [1, d].
        maximum: upper bound.
        num_steps, latent_dim: K and d (None if not known yet).
        learn: whether the step size is trained.

    Raises:
        ValueError: values outside (0, maximum), or a shape that does not fit.
        TypeError: a maximum that is a tensor, or an initial value that requires a gradient.
    """

    def __init__(
        self,
        initial: float | Sequence[float] | Tensor,
        maximum: float,
        num_steps: int,
        latent_dim: int | None,
        learn: bool,
    ) -> None:
        super().__init__()
        expect_numbers("step_size", max_step_size=maximum)
        for given in initial if isinstance(initial, (list, tuple)) else (initial,):
            if isinstance(given, Tensor) and given.requires_grad:
                raise TypeError(
                    f"step_size: expected values, got a {type(given).__name__} that requires a gradient, which it "
                    "would not get: these are where the model's own parameter starts (learn_step_size); detach it"
                )
        expect(
            math.isfinite(maximum) and maximum > 0, "max_step_size: expected a finite number above 0", maximum
        )
        value = torch.as_tensor(initial, dtype=torch.float64, device="cpu").detach()
        value = _as_flow_shape(value, num_steps, latent_dim)
        if not bool(((value > 0) & (value < maximum)).all()):
            raise ValueError(
                f"step_size: expected values in (0, max_step_size = {maximum}), "
                f"got {value.min().item():.6g} to {value.max().item():.6g}"
            )
        self.maximum = float(maximum)
        # Of the default type, and on the default device as the parameters of PyTorch's modules.
        logit = torch.tensor(torch.logit(value / maximum).tolist())
        self.logit = nn.Parameter(logit, requires_grad=learn)

    def forward(self) -> Tensor:
        """The step size as ``hamiltonian_flow`` takes it: [], [d], [K, 1] or [K, d]."""
        return self.maximum * torch.sigmoid(self.logit)

    def extra_repr(self) -> str:
        """What ``repr`` says of the settings."""
        return f"shape={list(self.logit.shape)}, maximum={self.maximum}"


def _as_flow_shape(value: Tensor, num_steps: int, latent_dim: int | None) -> Tensor:
    known = f"K = {num_steps} and d = {'not known yet' if latent_dim is None else latent_dim}"
    if value.dim() == 0:
        return value
    if value.dim() == 1 and len(value) == num_steps:
        if latent_dim is None or latent_dim == num_steps:
            raise ValueError(
                f"step_size: {len(value)} values may be one a step or one a dimension ({known}); "
                "pass them as [K, 1] or [1, d]"
            )
        return value[:, None]
    fits_dim = latent_dim is None or value.shape[-1] == latent_dim
    if value.dim() == 1 and fits_dim:
        return value
    if value.dim() == 2 and value.shape[0] == num_steps and (fits_dim or value.shape[1] == 1):
        return value
    if value.dim() == 2 and value.shape[0] == 1 and fits_dim:
        return value[0]
    raise ValueError(
        f"step_size: expected a number, [d], [K], [K, 1] or [K, d] with {known}, got {list(value.shape)}"
    )
