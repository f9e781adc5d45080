"""The loss of each image as a function of its approximate posterior, and its gradient: nothing else is formed."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastvae._extension import raw
from fastvae.lowering import CoupledSamples, LoweredNetwork, UnsupportedLayer, lower
from fastvae.models import VAE
from fastvae.models.base import BaseVAE, encoded_already
from fastvae.ops.hamiltonian_flow import observed_rows

__all__ = ["PosteriorObjective"]


class PosteriorObjective:
    """Minus the ELBO with beta = 1, for a mean and a log variance that need not be the encoder's.

    A VAE whose decoder can be lowered runs forward and back in one sweep with its likelihood; any other model
    goes through its own ``objective`` and autograd, with all its parameters frozen.

    Args:
        model: a private copy in eval mode, its parameters frozen.
        x: [B, ...], on the model's device.
        codes: [B, d], at the first two of which the decoder is compared with what was read of it.
    """

    def __init__(self, model: BaseVAE, x: Tensor, codes: Tensor) -> None:
        self._model, self._x = model, x
        self._network = _swept_decoder(model, codes)

    def __call__(self, posterior: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """The loss [B] and its gradient [B, 2 d].

        Args:
            posterior: mean before log variance, [B, 2 d].
            noise: [noise_draws, B, d].
        """
        if self._network is None:
            return self._by_autograd(posterior, noise)
        mu, logvar = posterior.chunk(2, 1)
        scaled = torch.exp(logvar / 2) * noise[0]
        z = mu + scaled
        like = self._model.likelihood
        log_px, force = raw.decoder_gradient(
            z, observed_rows(self._x, z, like), self._network.tensors, self._network.spec, like.spec
        )
        variance = logvar.exp()
        loss = 0.5 * (mu.square() + variance - 1 - logvar).sum(1) - log_px
        return loss, torch.cat((mu - force, 0.5 * (variance - 1 - scaled * force)), 1)

    def _by_autograd(self, posterior: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            leaf = posterior.detach().requires_grad_()
            mu, logvar = leaf.chunk(2, 1)
            model = encoded_already(self._model, self._x, (mu, logvar))
            loss = model.objective(self._x, beta=1.0, noise=noise).loss
            (grad,) = torch.autograd.grad(loss.sum(), leaf)
        return loss.detach(), grad


def _swept_decoder(model: Any, codes: Tensor) -> LoweredNetwork | None:
    """The decoder's layers, where the model's objective is a VAE's own."""
    stock = isinstance(model, VAE) and type(model).objective is VAE.objective
    if not stock or type(model).log_px is not BaseVAE.log_px or not model.likelihood.has_kernel:
        return None
    try:
        return lower(model.decoder, strip_sigmoid=model.likelihood.probs, compare_at=codes)
    except CoupledSamples:
        raise
    except (UnsupportedLayer, ValueError):
        return None
