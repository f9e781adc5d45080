"""The variational autoencoder."""

from __future__ import annotations

import torch
from torch import Tensor

from fastvae import ops
from fastvae._elbo_reference import ElboTerms, gaussian_kl, reparameterize
from fastvae.models.base import BaseVAE, Noise, TrainingStep
from fastvae.models.inputs import half_dtype_of
from fastvae.models.observation import Observation
from fastvae.models.steps import is_loss_alone

__all__ = ["VAE"]

# Latent variables of the codes that are drawn at once while importance sampling.
_CODE_NUMBERS = 2**20


class VAE(BaseVAE):
    """Variational autoencoder (Kingma, Welling, ICLR 2014, equation 10), with beta (Higgins et al., ICLR
    2017).

    The loss of a sample is beta KL(q(z | x) || N(0, I)) - log p(x | z), z = mu + sigma eps, with the KL in
    closed form. Arguments, shapes and errors: ``BaseVAE``.
    """

    has_closed_kl = True

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
        """beta KL(q(z | x) || N(0, I)) - log p(x | z) and its parts; see ``BaseVAE.objective``."""
        observation = Observation(x, condition, weight)
        found, noise = self.fused_terms(observation, noise, generator)
        if found is None:
            mu, logvar = self.encode(x, **observation.given)
            z = reparameterize(mu, logvar, self._noise(mu, noise, generator)[0])
            log_px = self.log_px(z, x, **observation.given)
            # Not ops.gaussian_kl, which is differentiable once: this loss is differentiable as often as the networks
            # are, and under torch.func, which users' per-sample gradients and Hessians need.
            kl = gaussian_kl(mu, logvar)
        else:
            z, log_px, kl, mu, logvar = found.z[0], found.log_px[0], found.kl, found.mu, found.logvar
        loss = self._kl_weight(beta) * kl - log_px
        return TrainingStep(self, x, mu, logvar, z, z, log_px, loss, generator, kl, *observation[1:])

    def fused_terms(
        self, observation: Observation, noise: Noise | None, generator: torch.Generator | None
    ) -> tuple[ElboTerms | None, Noise | None]:
        """The terms of the objective by one operator, and their noise; None where it does not take them.

        Nor where somebody may look into the step: one of its tensors is then no function of another.
        """
        if not is_loss_alone():
            return None, noise
        by_kernels = self.fused(observation)
        if by_kernels is None:
            return None, noise
        noise = self._noise(by_kernels.means, noise, generator)
        return by_kernels.terms(noise), noise

    def log_weight(
        self,
        x: Tensor,
        mu: Tensor,
        logvar: Tensor,
        noise: Tensor,
        condition: Tensor | None = None,
        weight: Tensor | None = None,
    ) -> Tensor:
        """log p(x | z) + log p(z) - log q(z | x) at z = mu + sigma noise[0]: [N]."""
        return self.weighted_codes(Observation(x, condition, weight), mu, logvar, noise)[1]

    def weighted_codes(
        self, observation: Observation, mu: Tensor, logvar: Tensor, noise: Tensor
    ) -> tuple[Tensor, Tensor]:
        """z = mu + sigma noise[0], and its ``log_weight``."""
        z = reparameterize(mu, logvar, noise[0])
        log_px = self.log_px(z, observation.x, **observation.given)
        return z, log_px + 0.5 * (noise[0].square() + logvar - z.square()).sum(1)

    @torch.no_grad()
    def log_weights(
        self,
        x: Tensor,
        mu: Tensor,
        logvar: Tensor,
        noise: Tensor,
        condition: Tensor | None = None,
        weight: Tensor | None = None,
    ) -> Tensor:
        """``log_weight`` of several draws, [S, B], without a gradient; see :func:`fastvae.ops.log_px`."""
        observation = Observation(x, condition, weight)
        if half_dtype_of(self.decoder) is not None:
            return super().log_weights(x, mu, logvar, noise, **observation.given)
        z = reparameterize(mu, logvar, noise[0])
        log_px = ops.log_px(self.decoder, z, x, self.likelihood, **observation.given)
        return log_px + 0.5 * (noise[0].square() + logvar - z.square()).sum(2)

    def _codes_at_once(self, x: Tensor, mu: Tensor) -> int:
        if half_dtype_of(self.decoder) is not None:
            return super()._codes_at_once(x, mu)
        return max(1, _CODE_NUMBERS // max(1, mu.shape[1]))

    def sample_posterior(
        self,
        x: Tensor,
        *,
        generator: torch.Generator | None = None,
        condition: Tensor | None = None,
        weight: Tensor | None = None,
    ) -> Tensor:
        """One z ~ q(z | x) for each x: [B, d]."""
        mu, logvar = self.encode(x, **Observation(x, condition, weight).given)
        return reparameterize(mu, logvar, self.draw_noise(mu, generator)[0])
