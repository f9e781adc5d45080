"""The importance-weighted autoencoder."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from fastvae._compiling import is_compiling
from fastvae._elbo_reference import IWAE_ESTIMATORS, bound_of, reparameterize
from fastvae.arguments import expect_choice, expect_integers
from fastvae.likelihoods import Likelihood
from fastvae.models.base import Noise, TrainingStep
from fastvae.models.observation import Observation
from fastvae.models.vae import VAE
from fastvae.ops.iwae_bound import is_tileable, noise_of, tiled_bound
from fastvae.randomness import standard_normal

__all__ = ["IWAE"]

# Decoder outputs of a step beyond which its draws are decoded in tiles: 128 MiB of float32, before activations.
_OUTPUTS_AT_ONCE = 2**25


class IWAE(VAE):
    """Importance-weighted autoencoder (Burda, Grosse, Salakhutdinov, ICLR 2016, equation 8).

    The loss of a sample is minus the bound

        L_K = E[log 1/K sum_k w_k],   log w_k = log p(x | z_k) + beta (log p(z_k) - log q(z_k | x)),   z_k ~ q(z | x)

    with K = ``num_samples``; the K codes of all samples are decoded as one batch. Where their outputs are more than
    2^25 numbers, they are decoded in tiles, as by :func:`fastvae.ops.iwae_bound`: in the memory of a few draws, and
    differentiable once. ``elbo`` is L_K with beta = 1. In a ``TrainingStep`` (what penalties see) z_0, z and log_px are
    those of the first of the K codes.

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
        expect_integers("IWAE", 1, num_samples=num_samples)
        expect_choice("IWAE", IWAE_ESTIMATORS, estimator=estimator)
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
        shape = (mu.shape[0], self.noise_draws if draws is None else draws, mu.shape[1])
        return standard_normal(shape, mu, generator).transpose(0, 1)

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
        observation = Observation(x, condition, weight)
        beta = self._kl_weight(beta)
        if not callable(noise) and self._is_large(x) and is_tileable(self.decoder, x):
            return self._in_tiles(observation, noise, generator, beta)
        # The operator's z has no gradient of the decoder's, which dreg weighs.
        found = None
        if self.estimator != "dreg":
            found, noise = self.fused_terms(observation, noise, generator)
        if found is None:
            mu, logvar = self.encode(x, **observation.given)
            noise = self._noise(mu, noise, generator)
            z, each = reparameterize(mu, logvar, noise), observation.interleaved(len(noise))
            rows = z.transpose(0, 1)
            log_px = self.log_px(rows.flatten(0, 1), each.x, **each.given).reshape(rows.shape[:2]).t()
        else:
            log_px, _, mu, logvar, z = found
        assert isinstance(noise, Tensor)
        loss = -bound_of(log_px, z, mu, logvar, noise, estimator=self.estimator, beta=beta)
        first = z[0]
        return TrainingStep(
            self, x, mu, logvar, first, first, log_px[0], loss, generator, None, *observation[1:]
        )

    def _in_tiles(
        self,
        observation: Observation,
        noise: Tensor | None,
        generator: torch.Generator | None,
        beta: float,
    ) -> TrainingStep:
        """The step in the memory of a few draws, of which the first is decoded once more to be looked at."""
        mu, logvar = self.encode(observation.x, **observation.given)
        if noise is not None:
            noise = self._noise(mu, noise, generator)
        draws = noise_of(mu, noise, generator)
        bound = tiled_bound(
            self.decoder, observation.x, mu, logvar, draws, self.num_samples, self.likelihood,
            estimator=self.estimator, beta=beta, **observation.given,
        )  # fmt: skip
        z = reparameterize(mu, logvar, draws(0, 1)[0].to(mu))
        log_px = self.log_px(z, observation.x, **observation.given)
        return TrainingStep(
            self, observation.x, mu, logvar, z, z, log_px, -bound, generator, None, *observation[1:]
        )

    def _is_large(self, x: Tensor) -> bool:
        """Whether the outputs of all draws at once are many, and decoding them is this model's own."""
        if not isinstance(x, Tensor) or self.overrides("decode", "log_px") or is_compiling():
            return False
        return self.num_samples * x.numel() * self.likelihood.values_per_element > _OUTPUTS_AT_ONCE

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

    def extra_repr(self) -> str:
        """What ``repr`` says of the settings."""
        return f"{super().extra_repr()}, num_samples={self.num_samples}, estimator={self.estimator!r}"
