"""VAEs with the penalty of their paper: constructors, and nothing more."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor, nn

from fastvae.likelihoods import Likelihood
from fastvae.models.vae import VAE
from fastvae.penalties.annealing import BetaAnnealing
from fastvae.penalties.consistency import Consistency
from fastvae.penalties.jacobian_l1 import JacobianL1

__all__ = ["ConsistencyVAE", "JacobianL1VAE"]


class ConsistencyVAE(VAE):
    """CR-VAE (Sinha and Dieng, "Consistency Regularization for Variational Auto-Encoders", NeurIPS 2021).

    The loss of a sample is -ELBO(x) - ELBO(x~) + consistency KL(q(z | x~) || q(z | x)) with x~ = augment(x). The same
    as ``VAE(..., penalties=[Consistency(augment, consistency, noise=noise)])``; ``elbo`` and ``log_likelihood`` are
    those of x alone.

    Args:
        encoder, decoder, likelihood, penalties, options: see ``BaseVAE``.
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
        penalties: Iterable[nn.Module] = (),
        **options: Any,
    ) -> None:
        own = Consistency(augment, consistency, noise=noise)
        super().__init__(encoder, decoder, likelihood, penalties=[own, *penalties], **options)


class JacobianL1VAE(VAE):
    """JL1-VAE (Rhodes and Lee, "Local Disentanglement in Variational Auto-Encoders Using Jacobian L1
    Regularization", NeurIPS 2021).

    The loss of a sample is beta KL(q(z | x) || N(0, I)) - log p(x | z) + gamma sum_i sum_p |d y_p / d z_i|.
    The same as ``VAE(..., penalties=[JacobianL1(gamma, anneal_steps), BetaAnnealing(anneal_steps)])``.

    Args:
        encoder, decoder, likelihood, penalties, options: see ``BaseVAE``.
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
        gamma: float = 0.1,
        anneal_steps: int = 0,
        estimator: str = "exact",
        step: float = 1e-2,
        penalties: Iterable[nn.Module] = (),
        **options: Any,
    ) -> None:
        own: list[nn.Module] = [JacobianL1(gamma, anneal_steps, estimator=estimator, step=step)]
        if anneal_steps:
            own.append(BetaAnnealing(anneal_steps))
        super().__init__(encoder, decoder, likelihood, penalties=[*own, *penalties], **options)
