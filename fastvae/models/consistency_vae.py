"""The VAE with consistency regularisation."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from torch import Tensor, nn

from fastvae.likelihoods import Likelihood
from fastvae.models.vae import VAE
from fastvae.penalties import Consistency

__all__ = ["ConsistencyVAE"]


class ConsistencyVAE(VAE):
    """CR-VAE (Sinha and Dieng, "Consistency Regularization for Variational Auto-Encoders", NeurIPS 2021).

    The loss of a sample is -ELBO(x) - ELBO(x~) + consistency KL(q(z | x~) || q(z | x)) with x~ = augment(x). The same
    as ``VAE(..., penalties=[Consistency(augment, consistency, noise=noise)])``; ``elbo`` and ``log_likelihood`` are
    those of x alone.

    Args:
        encoder, decoder, likelihood, beta, latent_dim, penalties, check_finite, max_logvar: see ``BaseVAE``.
        augment: see ``penalties.Consistency``; ``fastvae.data.RandomAffine()`` is the paper's.
        consistency: lambda, see ``penalties.Consistency``.
        noise: "independent" or "common", see ``penalties.Consistency``.
    """

    def __init__(
        self,
        encoder: nn.Module,
        decoder: nn.Module,
        likelihood: str | Likelihood = "bernoulli",
        *,
        augment: Callable[..., Tensor],
        consistency: float = 1e-3,
        noise: str = "independent",
        beta: float = 1.0,
        latent_dim: int | None = None,
        penalties: Iterable[nn.Module] = (),
        check_finite: bool = True,
        max_logvar: float | None = None,
    ) -> None:
        super().__init__(
            encoder,
            decoder,
            likelihood,
            beta=beta,
            latent_dim=latent_dim,
            penalties=[Consistency(augment, consistency, noise=noise), *penalties],
            check_finite=check_finite,
            max_logvar=max_logvar,
        )
