"""The importance-weighted autoencoder."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from fastvae.arguments import expect_numbers, is_integer
from fastvae.likelihoods import Likelihood
from fastvae.models.base import Noise, TrainingStep
from fastvae.models.observation import Observation
from fastvae.models.vae import VAE
from fastvae.reference import ElboTerms

__all__ = ["IWAE"]

ESTIMATORS = ("standard", "stl", "dreg")


class IWAE(VAE):
    """Importance-weighted autoencoder (Burda, Grosse, Salakhutdinov, ICLR 2016, equation 8).

    The loss of a sample is minus the bound

        L_K = E[log 1/K sum_k w_k],   log w_k = log p(x | z_k) + beta (log p(z_k) - log q(z_k | x)),   z_k ~ q(z | x)

    with K = ``num_samples``; the K codes of all samples are decoded as one batch, those of a sample side by side.
    ``elbo`` is L_K with beta = 1. In a ``TrainingStep`` (what penalties see) z_0, z and log_px are those of the first
    of the K codes.

    Args:
        encoder, decoder, likelihood, beta, latent_dim, penalties, check_finite, max_logvar: see ``BaseVAE``.
        num_samples: K; 1 is a VAE whose KL is sampled.
        estimator: of the encoder's gradient; the loss and the decoder's gradient are the same in all three.
            "standard": that of the bound itself. "stl": without the score of q, which has mean zero at K = 1 (Roeder,
            Wu, Duvenaud, NeurIPS 2017), and biased for K > 1. "dreg": doubly reparameterised, unbiased, of less noise
            as K grows (Tucker, Lawson, Gu, Maddison, ICLR 2019, equation 8; derived for beta = 1).

    Raises:
        ValueError: num_samples below 1, an unknown estimator; see also ``BaseVAE``.
    """

    linear_in_beta = False
    weight_draws = 1
    has_closed_kl = False

    def __init__(
        self,
        encoder: nn.Module,
        decoder: nn.Module,
        likelihood: str | Likelihood = "bernoulli",
        *,
        num_samples: int = 50,
        estimator: str = "standard",
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
            penalties=penalties,
            check_finite=check_finite,
            max_logvar=max_logvar,
        )
        expect_numbers("IWAE", num_samples=num_samples)
        if not is_integer(num_samples) or num_samples < 1:
            raise ValueError(f"IWAE: num_samples: expected an int of at least 1, got {num_samples!r}")
        if estimator not in ESTIMATORS:
            raise ValueError(f"IWAE: estimator: expected one of {ESTIMATORS}, got {estimator!r}")
        self.noise_draws = int(num_samples)
        self.estimator = estimator

    @property
    def num_samples(self) -> int:
        """K."""
        return self.noise_draws

    def draw_noise(
        self, mu: Tensor, generator: torch.Generator | None = None, draws: int | None = None
    ) -> Tensor:
        """Standard normal [draws, B, d] like mu in one draw; drawn on the generator's device and moved."""
        device = mu.device if generator is None else generator.device
        shape = (mu.shape[0], self.noise_draws if draws is None else draws, mu.shape[1])
        drawn = torch.randn(shape, generator=generator, device=device, dtype=mu.dtype)
        return drawn.to(mu.device).transpose(0, 1)

    def objective(
        self,
        x: Tensor,
        *,
        beta: float | None = None,
        noise: Noise | None = None,
        generator: torch.Generator | None = None,
        condition: Tensor | None = None,
        weight: Tensor | None = None,
    ) -> TrainingStep:
        """Minus the bound above and its parts; see ``BaseVAE.objective`` (K draws of noise)."""
        seen = Observation(x, condition, weight)
        # The operator's z has no gradient of the decoder's, which dreg weighs.
        found, noise = self.terms(seen, noise, generator, by_parts=self.estimator == "dreg")
        z, count = found.z, len(found.z)
        log_weights = found.log_px + self._kl_weight(beta) * self._log_ratio(found, noise)
        if self.estimator == "dreg" and z.requires_grad:
            # The gradient that reaches the encoder by a code has its normalised weight once: now it has it twice.
            share = torch.softmax(log_weights.detach(), 0)[..., None]
            z.register_hook(lambda grad: grad * share)
        loss = math.log(count) - torch.logsumexp(log_weights, 0)
        return TrainingStep(
            self, x, found.mu, found.logvar, z[0], z[0], found.log_px[0], loss, generator, None, *seen[1:]
        )

    def log_weight(
        self,
        x: Tensor,
        mu: Tensor,
        logvar: Tensor,
        noise: Tensor,
        condition: Tensor | None = None,
        weight: Tensor | None = None,
    ) -> Tensor:
        """log of the mean of the weights of the draws, noise [draws, N, d]: [N]."""
        besides = Observation(x, condition, weight).given
        each = torch.stack(
            [super(IWAE, self).log_weight(x, mu, logvar, draw[None], **besides) for draw in noise]
        )
        return torch.logsumexp(each, 0) - math.log(len(noise))

    def _log_ratio(self, found: ElboTerms, noise: Tensor) -> Tensor:
        """log p(z) - log q(z | x) [K, B]: by the noise, or as a function of z alone for a q that is given."""
        z, logvar = found.z, found.logvar
        if self.estimator == "standard":
            log_q = noise.square() + logvar
        else:
            mu, logvar = found.mu.detach(), logvar.detach()
            log_q = (z - mu).square() * torch.exp(-logvar) + logvar
        return 0.5 * (log_q - z.square()).sum(2)

    def extra_repr(self) -> str:
        """What ``repr`` says of the settings."""
        return f"{super().extra_repr()}, num_samples={self.num_samples}, estimator={self.estimator!r}"
