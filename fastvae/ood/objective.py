"""The loss of each image as a function of its approximate posterior, and its gradient: nothing else is formed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastvae._extension import raw
from fastvae.likelihoods.learned import without_parameters
from fastvae.likelihoods.weighted import weighted
from fastvae.lowering import CoupledSamples, UnsupportedLayer, lower
from fastvae.models import VAE
from fastvae.models.base import BaseVAE, encoded_already
from fastvae.models.observation import Observation
from fastvae.network.flow import log_px_and_force
from fastvae.network.heads import make_head
from fastvae.network.sweeps import Inputs
from fastvae.ops._registration import read_decoder
from fastvae.ops.hamiltonian_flow import observed_rows

__all__ = ["PosteriorObjective"]


class PosteriorObjective:
    """Minus the ELBO with beta = 1, for a mean and a log variance that need not be the encoder's.

    The decoder of a VAE runs forward and back in one sweep with its likelihood, by kernels or read as a graph; any
    other model goes through its own ``objective`` and autograd, with all its parameters frozen.

    Args:
        model: a private copy in eval mode, its parameters frozen.
        observation: x [B, ...] and what goes with it, on the model's device.
        codes: [B, d], at the first two of which the decoder is compared with what was read of it.
    """

    def __init__(self, model: BaseVAE, observation: Observation, codes: Tensor) -> None:
        self._model, self._seen = model, observation
        self._sweep = None if observation.given else _by_kernels(model, observation.x, codes)
        self.can_be_captured = self._sweep is not None
        """Whether a CUDA graph may hold it: nothing but kernels runs."""
        self._sweep = self._sweep or _by_reading(model, observation, codes)

    def __call__(self, posterior: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """The loss [B] and its gradient [B, 2 d].

        Args:
            posterior: mean before log variance, [B, 2 d].
            noise: [noise_draws, B, d].
        """
        if self._sweep is None:
            return self._by_autograd(posterior, noise)
        mu, logvar = posterior.chunk(2, 1)
        scaled = torch.exp(logvar / 2) * noise[0]
        log_px, force = self._sweep(mu + scaled)
        variance = logvar.exp()
        loss = 0.5 * (mu.square() + variance - 1 - logvar).sum(1) - log_px
        return loss, torch.cat((mu - force, 0.5 * (variance - 1 - scaled * force)), 1)

    def _by_autograd(self, posterior: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            leaf = posterior.detach().requires_grad_()
            mu, logvar = leaf.chunk(2, 1)
            model = encoded_already(self._model, self._seen.x, (mu, logvar))
            loss = model.objective(self._seen.x, beta=1.0, noise=noise, **self._seen.given).loss
            (grad,) = torch.autograd.grad(loss.sum(), leaf)
        return loss.detach(), grad


_Sweep = Callable[[Tensor], tuple[Tensor, Tensor]]
"""log p(x | z) [B] and its gradient [B, d] as a function of z."""


def _is_stock(model: Any) -> bool:
    """Whether the model's objective is a VAE's own."""
    kind = type(model)
    stock = isinstance(model, VAE) and kind.objective is VAE.objective and kind.decode is BaseVAE.decode
    return stock and kind.log_px is BaseVAE.log_px


def _by_kernels(model: Any, x: Tensor, codes: Tensor) -> _Sweep | None:
    """Of a decoder that is lowered."""
    if not _is_stock(model) or not model.likelihood.has_kernel:
        return None
    like = model.likelihood
    try:
        lowered = lower(model.decoder, strip_sigmoid=like.probs, compare_at=codes)
        observed = observed_rows(x, codes, like)
    except CoupledSamples:
        raise
    except (UnsupportedLayer, ValueError):
        return None
    base = like.base_measure(x, codes.dtype)

    def sweep(z: Tensor) -> tuple[Tensor, Tensor]:
        log_px, gradient = raw.decoder_gradient(z, observed, lowered.tensors, lowered.spec, like.spec)
        return log_px if base is None else log_px + base, gradient

    return sweep


def _by_reading(model: Any, observation: Observation, codes: Tensor) -> _Sweep | None:
    """Of a decoder that is read as a graph."""
    if not _is_stock(model):
        return None
    decoder, like = without_parameters(model.decoder, model.likelihood)
    try:
        read = read_decoder("log_px_and_force", decoder, codes, "autograd", like, observation.condition)
    except CoupledSamples:
        raise
    except (UnsupportedLayer, TypeError, ValueError):
        return None
    if read is None:
        return None
    sweeps, inputs = read.sweeps, Inputs(read.sweeps, codes, read.tensors)
    head = make_head(
        weighted("LikelihoodRegret", like, observation.weight, observation.x), observation.x, codes
    )
    return lambda z: log_px_and_force(sweeps, inputs, head, z)
