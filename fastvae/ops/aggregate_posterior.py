"""The density of codes under the mixture of many posteriors, and under its marginals, fused, with its gradient."""

from __future__ import annotations

import torch
from torch import Tensor

from fastvae.ops._registration import (
    cast_under_autocast,
    check_one_device,
    check_rank,
    check_tensors,
    empty_gradients,
    float32_under_autocast,
    refuse_function_transforms,
)
from fastvae.reference import AggregatePosterior


def aggregate_posterior(z: Tensor, mu: Tensor, logvar: Tensor) -> AggregatePosterior:
    """log q(z) and log q(z_j) of the aggregate posterior q(z) = 1/N sum_n N(z; mu_n, diag exp(logvar_n)).

    What the terms of the KL divergence are made of that Chen et al., "Isolating Sources of Disentanglement in VAEs",
    NeurIPS 2018, equation 2, take apart: mutual information, total correlation and the divergence of each coordinate.
    With z drawn from the same N posteriors of a minibatch of a data set of D samples, their estimate by minibatch
    weighted sampling (equation S4) is this minus log D, a constant. Memory is that of arguments and results: the M N d
    densities are not kept, but computed again for the gradient.

    Args:
        z: codes, [M, d], float32 or float64, CPU or CUDA.
        mu, logvar: means and log variances of N >= 1 posteriors, [N, d].

    Returns:
        log_q [M] and log_marginals [M, d]; differentiable once in every argument.

    Raises:
        ValueError: shapes or devices that do not fit together, no posterior.
        TypeError: dtypes other than float32 and float64, or mixed.
        NotImplementedError: forward-mode differentiation, torch.func transforms, a second derivative.
    """
    check_tensors("aggregate_posterior", z=z, mu=mu, logvar=logvar)
    refuse_function_transforms("aggregate_posterior", z)
    found = torch.ops.fastvae.aggregate_posterior(float32_under_autocast(z), mu, logvar)
    return AggregatePosterior(*found)


@torch.library.register_fake("fastvae::aggregate_posterior")
def _(z: Tensor, mu: Tensor, logvar: Tensor) -> tuple[Tensor, Tensor]:
    _check("aggregate_posterior", z, mu, logvar)
    return z.new_empty(z.shape[0]), z.new_empty(z.shape)


@torch.library.register_fake("fastvae::aggregate_posterior_backward")
def _(
    grad_log_q: Tensor,
    grad_log_marginals: Tensor,
    z: Tensor,
    mu: Tensor,
    logvar: Tensor,
    log_q: Tensor,
    log_marginals: Tensor,
    needs: list[int],
) -> tuple[Tensor, ...]:
    name = "aggregate_posterior_backward"
    _check(
        name,
        z,
        mu,
        logvar,
        grad_log_q=grad_log_q,
        grad_log_marginals=grad_log_marginals,
        log_q=log_q,
        log_marginals=log_marginals,
    )
    return tuple(empty_gradients(name, z, [z, mu, logvar], needs))


def _check(name: str, z: Tensor, mu: Tensor, logvar: Tensor, **others: Tensor) -> None:
    check_one_device(name, z, "z", mu=mu, logvar=logvar, **others)
    check_rank(name, "z", z, "[M, d]")
    check_rank(name, "mu", mu, "[N, d]")


cast_under_autocast("aggregate_posterior")
