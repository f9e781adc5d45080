"""The VAE with a Jacobian L1 penalty."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from fastvae.likelihoods import Likelihood
from fastvae.models.vae import VAE
from fastvae.penalties import BetaAnnealing, JacobianL1

__all__ = ["JacobianL1VAE"]


class JacobianL1VAE(VAE):
    """JL1-VAE (Rhodes and Lee, "Local Disentanglement in Variational Auto-Encoders Using Jacobian L1
    Regularization", NeurIPS 2021).

    The loss of a sample is beta KL(q(z | x) || N(0, I)) - log p(x | z) + gamma sum_i sum_p |d y_p / d z_i|.
    The same as ``VAE(..., penalties=[JacobianL1(gamma, anneal_steps), BetaAnnealing(anneal_steps)])``.

    Args:
        encoder, decoder, likelihood, beta, latent_dim, penalties, check_finite, max_logvar: see ``BaseVAE``.
        gamma, estimator, step: see ``penalties.JacobianL1``.
        anneal_steps: beta and gamma both grow linearly from 0 over so many optimisation steps, as the authors
            have it. ``fit`` counts them; a training loop of your own calls ``step()`` of each of
            ``model.penalties``.
    """

    def __init__(
        self,
        encoder: nn.Module,
        decoder: nn.Module,
        likelihood: str | Likelihood = "bernoulli",
        *,
        beta: float = 1.0,
        gamma: float = 0.1,
        anneal_steps: int = 0,
        estimator: str = "exact",
        step: float = 1e-2,
        latent_dim: int | None = None,
        penalties: Iterable[nn.Module] = (),
        check_finite: bool = True,
        max_logvar: float | None = None,
    ) -> None:
        own: list[nn.Module] = [JacobianL1(gamma, anneal_steps, estimator=estimator, step=step)]
        if anneal_steps:
            own.append(BetaAnnealing(anneal_steps))
        super().__init__(
            encoder,
            decoder,
            likelihood,
            beta=beta,
            latent_dim=latent_dim,
            penalties=[*own, *penalties],
            check_finite=check_finite,
            max_logvar=max_logvar,
        )
