"""The Kullback-Leibler divergence of diagonal Gaussians, fused, with its gradient."""

from __future__ import annotations

import torch
from torch import Tensor

from fastvae.arguments import given
from fastvae.ops._registration import (
    cast_under_autocast,
    check_one_device,
    check_rank,
    check_tensors,
    float32_under_autocast,
    refuse_function_transforms,
)


def gaussian_kl(
    mu_q: Tensor, logvar_q: Tensor, mu_p: Tensor | None = None, logvar_p: Tensor | None = None
) -> Tensor:
    """KL(N(mu_q, exp(logvar_q)) || N(mu_p, exp(logvar_p))) of each sample, in nats.

        KL = 1/2 sum_j [e^l - 1 - l + (mu_q - mu_p)^2 e^-logvar_p]_j,    l = logvar_q - logvar_p

    Kingma and Welling, Auto-Encoding Variational Bayes, ICLR 2014, appendix B, where p is standard normal. e^l - 1 - l
    is computed in one piece: a divergence of nearly equal Gaussians keeps its digits.

    Args:
        mu_q, logvar_q: mean and log variance of q, [B, d], float32 or float64, CPU or CUDA.
        mu_p, logvar_p: the same of p; None for both: p is standard normal.

    Returns:
        [B], at least 0 but for NaN; differentiable once in every argument. A log variance whose ratio overflows
        gives infinity.

    Raises:
        ValueError: shapes or devices that do not fit together, or one of mu_p and logvar_p alone.
        TypeError: dtypes other than float32 and float64, or mixed.
        NotImplementedError: forward-mode differentiation, torch.func transforms, a second derivative.
    """
    of_p = {name: value for name, value in (("mu_p", mu_p), ("logvar_p", logvar_p)) if value is not None}
    check_tensors("gaussian_kl", mu_q=mu_q, logvar_q=logvar_q, **of_p)
    refuse_function_transforms("gaussian_kl", mu_q)
    return torch.ops.fastvae.gaussian_kl(float32_under_autocast(mu_q), logvar_q, mu_p, logvar_p)


@torch.library.register_fake("fastvae::gaussian_kl")
def _(mu_q: Tensor, logvar_q: Tensor, mu_p: Tensor | None, logvar_p: Tensor | None) -> Tensor:
    check_one_device("gaussian_kl", mu_q, "mu_q", logvar_q=logvar_q, **given(mu_p=mu_p, logvar_p=logvar_p))
    check_rank("gaussian_kl", "mu_q", mu_q, "[B, d]")
    return mu_q.new_empty(mu_q.shape[:1])


@torch.library.register_fake("fastvae::gaussian_kl_backward")
def _(
    grad: Tensor, mu_q: Tensor, logvar_q: Tensor, mu_p: Tensor | None, logvar_p: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    name = "gaussian_kl_backward"
    check_one_device(name, mu_q, "mu_q", grad=grad, logvar_q=logvar_q, **given(mu_p=mu_p, logvar_p=logvar_p))
    check_rank(name, "mu_q", mu_q, "[B, d]")
    new, of_p = mu_q.new_empty, 0 if mu_p is None else mu_q.shape
    return new(mu_q.shape), new(mu_q.shape), new(of_p), new(of_p)


cast_under_autocast("gaussian_kl")
