"""Evidence bounds in plain PyTorch, for :mod:`fastvae.reference` and for what kernels do not take."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastvae.decoding import called_on_copies, conditioned, natural_parameters
from fastvae.likelihoods import Likelihood, resolve
from fastvae.likelihoods.weighted import weighted
from fastvae.likelihoods.weights import expanded, filled

__all__ = [
    "IWAE_ESTIMATORS",
    "ElboTerms",
    "bound_at",
    "bound_of",
    "elbo",
    "elbo_terms",
    "gaussian_kl",
    "iwae_bound",
    "log_px_of_codes",
    "posterior_of",
    "reparameterize",
    "terms_at",
]

Encoder = Callable[..., Tensor | Sequence[Tensor]]
IWAE_ESTIMATORS = ("standard", "stl", "dreg")


class ElboTerms(NamedTuple):
    """What the evidence lower bound of S draws of noise is made of, at z = mu + sigma noise."""

    log_px: Tensor
    """[S, B] log p(x | z) in nats."""
    kl: Tensor
    """[B] KL(q(z | x) || N(0, I)) in nats."""
    mu: Tensor
    """[B, d] mean of q(z | x)."""
    logvar: Tensor
    """[B, d] its log variance."""
    z: Tensor
    """[S, B, d]"""


def reparameterize(mu: Tensor, logvar: Tensor, eps: Tensor) -> Tensor:
    """z = mu + sigma eps, sigma = exp(logvar / 2), all [B, d]."""
    return mu + torch.exp(logvar / 2) * eps


def gaussian_kl(
    mu_q: Tensor, logvar_q: Tensor, mu_p: Tensor | None = None, logvar_p: Tensor | None = None
) -> Tensor:
    """KL of diagonal Gaussians [B], p standard normal unless given; see :func:`fastvae.ops.gaussian_kl`."""
    if mu_p is None or logvar_p is None:
        return 0.5 * (mu_q.square() + logvar_q.exp() - 1 - logvar_q).sum(1)
    log_ratio = logvar_q - logvar_p
    return 0.5 * ((mu_q - mu_p).square() * (-logvar_p).exp() + log_ratio.exp() - 1 - log_ratio).sum(1)


def posterior_of(
    owner: str,
    encoder: Encoder,
    x: Tensor,
    likelihood: Likelihood,
    dtype: torch.dtype,
    condition: Tensor | None,
    weight: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Mean and log variance [B, d] of q(z | x), from an encoder that gives them side by side or as two."""
    if weight is not None:
        x = filled(x, expanded(owner, weight, x))
    given = () if condition is None else (condition,)
    output = called_on_copies(encoder, likelihood.as_float(x, dtype), *given)
    mu, logvar = output.chunk(2, 1) if isinstance(output, Tensor) else output
    return mu, logvar


def log_px_of_codes(
    owner: str,
    decoder: Callable[..., Tensor],
    x: Tensor,
    likelihood: Likelihood,
    condition: Tensor | None,
    weight: Tensor | None,
    fused: Callable[..., Tensor | None] | None = None,
) -> Callable[[Tensor], Tensor]:
    """log p(x | z) [S, B] as a function of codes [S, B, d], which go through the decoder as one batch.

    Args:
        fused: ``fused_log_prob``, to be asked before the likelihood is.
    """

    def of_codes(z: Tensor) -> Tensor:
        each, own = x, None if weight is None else expanded(owner, weight, x)
        if len(z) > 1:
            each = x.repeat(len(z), *(1 for _ in x.shape[1:]))
            own = None if own is None else own.repeat(len(z), *(1 for _ in x.shape[1:]))
        params = natural_parameters(conditioned(decoder, condition), z.flatten(0, 1), likelihood)
        found = None if fused is None else fused(likelihood, params, each, own)
        if found is None:
            found = weighted(owner, likelihood, own, each).log_prob(params, each)
        return found.reshape(z.shape[:2])

    return of_codes


def terms_at(mu: Tensor, logvar: Tensor, noise: Tensor, log_px: Callable[[Tensor], Tensor]) -> ElboTerms:
    """The terms of :func:`elbo` for a posterior, and log p(x | z) [S, B] of codes [S, B, d]."""
    z = reparameterize(mu, logvar, noise)
    return ElboTerms(log_px(z), gaussian_kl(mu, logvar), mu, logvar, z)


def elbo_terms(
    encoder: Encoder,
    decoder: Callable[..., Tensor],
    x: Tensor,
    noise: Tensor,
    likelihood: str | Likelihood = "bernoulli",
    *,
    condition: Tensor | None = None,
    weight: Tensor | None = None,
    fused: Callable[..., Tensor | None] | None = None,
) -> ElboTerms:
    """The terms of :func:`elbo` at noise [S, B, d], from the networks as they are; fused: of ``log_px_of_codes``."""
    like, given = resolve(likelihood), (condition, weight)
    mu, logvar = posterior_of("elbo", encoder, x, like, noise.dtype, *given)
    if noise.shape[1:] != mu.shape:
        raise ValueError(f"elbo: noise: expected {list(mu.shape)} as means, got {list(noise.shape[1:])}")
    return terms_at(mu, logvar, noise, log_px_of_codes("elbo", decoder, x, like, *given, fused))


def elbo(
    encoder: Encoder,
    decoder: Callable[..., Tensor],
    x: Tensor,
    noise: Tensor,
    likelihood: str | Likelihood = "bernoulli",
    *,
    beta: float = 1.0,
    condition: Tensor | None = None,
    weight: Tensor | None = None,
) -> Tensor:
    """See :func:`fastvae.ops.elbo`: [B]."""
    found = elbo_terms(encoder, decoder, x, noise[None], likelihood, condition=condition, weight=weight)
    return found.log_px[0] - beta * found.kl


def bound_of(
    log_px: Tensor, z: Tensor, mu: Tensor, logvar: Tensor, noise: Tensor, *, estimator: str, beta: float
) -> Tensor:
    """:func:`iwae_bound` of log p(x | z) [K, B] at codes [K, B, d], of which "dreg" takes it for a function."""
    if estimator == "standard":
        log_q = noise.square() + logvar
    else:
        logvar = logvar.detach()
        log_q = (z - mu.detach()).square() * torch.exp(-logvar) + logvar
    log_weights = log_px + beta * 0.5 * (log_q - z.square()).sum(2)
    if estimator == "dreg" and z.requires_grad:
        # The gradient that reaches the encoder by a code has its normalised weight once: now it has it twice.
        share = torch.softmax(log_weights.detach(), 0)[..., None]
        z.register_hook(lambda grad: grad * share)
    return torch.logsumexp(log_weights, 0) - math.log(len(noise))


def bound_at(
    mu: Tensor,
    logvar: Tensor,
    noise: Tensor,
    log_px: Callable[[Tensor], Tensor],
    *,
    estimator: str,
    beta: float,
) -> Tensor:
    """:func:`iwae_bound` for a posterior, noise [K, B, d], and log p(x | z) [K, B] of codes [K, B, d]."""
    z = reparameterize(mu, logvar, noise)
    return bound_of(log_px(z), z, mu, logvar, noise, estimator=estimator, beta=beta)


def iwae_bound(
    encoder: Encoder,
    decoder: Callable[..., Tensor],
    x: Tensor,
    noise: Tensor,
    likelihood: str | Likelihood = "bernoulli",
    *,
    estimator: str = "standard",
    beta: float = 1.0,
    condition: Tensor | None = None,
    weight: Tensor | None = None,
) -> Tensor:
    """See :func:`fastvae.ops.iwae_bound`: [B], at noise [K, B, d], all K draws at once."""
    like, given = resolve(likelihood), (condition, weight)
    mu, logvar = posterior_of("iwae_bound", encoder, x, like, noise.dtype, *given)
    log_px = log_px_of_codes("iwae_bound", decoder, x, like, *given)
    return bound_at(mu, logvar, noise, log_px, estimator=estimator, beta=beta)
