"""The losses of models as a careful user writes them, and pythae's models."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fastvae
from fastvae.models import BaseVAE

Loss = Callable[[BaseVAE, Tensor, Tensor], Tensor]


def objective(model: BaseVAE, x: Tensor, noise: Tensor) -> Tensor:
    """Ours at a given noise: what a user compiles."""
    return model(x, noise=noise).mean()


def log_px(model: BaseVAE, z: Tensor, x: Tensor) -> Tensor:
    logits = model.decoder(z).flatten(1)
    return -F.binary_cross_entropy_with_logits(logits, x.flatten(1), reduction="none").sum(1)


def vae_loss(model: BaseVAE, x: Tensor, noise: Tensor) -> Tensor:
    mu, logvar = model.encoder(x).chunk(2, 1)
    kl = 0.5 * (mu.square() + logvar.exp() - 1 - logvar).sum(1)
    return (kl - log_px(model, mu + torch.exp(logvar / 2) * noise[0], x)).mean()


def iwae_loss(model: BaseVAE, x: Tensor, noise: Tensor) -> Tensor:
    mu, logvar = model.encoder(x).chunk(2, 1)
    z = mu + torch.exp(logvar / 2) * noise
    log_w = 0.5 * (noise.square() + logvar - z.square()).sum(2)
    log_w = log_w + log_px(model, z.flatten(0, 1), x.repeat(len(noise), 1, 1, 1)).reshape(log_w.shape)
    return (math.log(len(noise)) - log_w.logsumexp(0)).mean()


def hvae_loss(flow: Callable[..., Sequence[Tensor]]) -> Loss:
    def loss(model: BaseVAE, x: Tensor, noise: Tensor) -> Tensor:
        assert isinstance(model, fastvae.HVAE)
        mu, logvar = model.encoder(x).chunk(2, 1)
        z_0 = mu + torch.exp(logvar / 2) * noise[0]
        rho_0 = noise[1] / model.beta_0.sqrt()
        alpha = model.alpha.to(x.dtype)
        step_size = model.step_size.expand(len(alpha), 1)
        z, rho, log_likelihood = flow(model.decoder, z_0, rho_0, x.flatten(1), step_size, alpha)
        log_ratio = 0.5 * (logvar + noise.square().sum(0) - z.square() - rho.square()).sum(1)
        return -(log_likelihood + log_ratio).mean()

    return loss


def pythae_model(
    kind: str, options: dict[str, Any], shape: tuple[int, int, int], encoder: nn.Module, decoder: nn.Module
) -> nn.Module:
    """pythae's model around the same networks; its VAE and IWAE want probabilities, its HVAE logits.

    Raises:
        ImportError: pythae is not installed.
    """
    from pythae import models
    from pythae.models.base.base_utils import ModelOutput
    from pythae.models.nn import BaseDecoder, BaseEncoder

    class Encoder(BaseEncoder):
        def __init__(self) -> None:
            super().__init__()
            self.network = encoder

        def forward(self, x: Tensor) -> Any:
            mu, logvar = self.network(x).chunk(2, 1)
            return ModelOutput(embedding=mu, log_covariance=logvar)

    class Decoder(BaseDecoder):
        def __init__(self) -> None:
            super().__init__()
            self.network = decoder

        def forward(self, z: Tensor) -> Any:
            logits = self.network(z)
            return ModelOutput(reconstruction=logits if kind == "HVAE" else logits.sigmoid())

    latents = next(decoder.parameters()).shape[1]
    config = getattr(models, kind + "Config")(
        input_dim=shape,
        latent_dim=latents,
        reconstruction_loss="bce",
        **options,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about the logits that it gets
        model: nn.Module = getattr(models, kind)(config, Encoder(), Decoder())
    return model
