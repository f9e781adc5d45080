"""pythae's models (Chadebec, Vincent, Allassonniere, NeurIPS 2022 Datasets and Benchmarks) as fastvae's.

pythae's networks return a ``ModelOutput``, a dictionary with attributes: an encoder's holds "embedding" and
"log_covariance", a decoder's "reconstruction". ``fastvae.models.SelectOutputs`` takes the tensors out; the networks
inside are the pythae model's own, so that both models have the same parameters, and training one trains the other.
"""

from __future__ import annotations

from typing import Any, TypeVar

from fastvae.likelihoods import Bernoulli, Gaussian, Likelihood
from fastvae.models import VAE, BaseVAE, SelectOutputs

__all__ = ["from_pythae", "likelihood_of"]

Model = TypeVar("Model", bound=BaseVAE)


def likelihood_of(model_config: Any) -> Likelihood:
    """What a pythae configuration's ``reconstruction_loss`` means as a density.

    "mse": half the squared error, pythae's sum over pixels, is minus the log density of ``Gaussian(scale=1)`` but for
    its constant, D/2 log(2 pi) nats. "bce": ``Bernoulli(probs=True)``, since pythae's decoders return
    probabilities; the fused operators take their last Sigmoid off.

    Raises:
        ValueError: there is none, or another.
    """
    name = getattr(model_config, "reconstruction_loss", None)
    if name == "mse":
        return Gaussian()
    if name == "bce":
        return Bernoulli(probs=True)
    raise ValueError(
        f"from_pythae: model_config.reconstruction_loss: expected 'mse' or 'bce', got {name!r} in "
        f"{type(model_config).__name__}; pass likelihood="
    )


def from_pythae(
    model: Any,
    model_class: type[Model] = VAE,  # type: ignore[assignment]
    *,
    likelihood: str | Likelihood | None = None,
    **options: Any,
) -> Model:
    """A fastvae model around the encoder and decoder of a pythae model, which it shares with it.

    Taken over are the two networks with their parameters, the latent size, the likelihood and, of a BetaVAE, beta.
    Not taken over is whatever else a pythae model has: its own flow, discriminator, prior or annealing; the objective
    is ``model_class``'s.

    Args:
        model: a pythae model whose encoder returns "embedding" and "log_covariance" (VAE, BetaVAE, IWAE, HVAE, ...),
            trained or not.
        model_class: ``fastvae.VAE``, ``fastvae.HVAE`` or another of fastvae's models.
        likelihood: None: see :func:`likelihood_of`.
        options: further arguments of ``model_class``, such as ``num_steps=`` or ``penalties=``.

    Returns:
        ``model_class`` around ``SelectOutputs`` of the two networks. It takes tensors x [B, ...];
        ``fastvae.fit`` takes pythae's loaders, whose batches are dictionaries with "data", as they are.

    Raises:
        TypeError: ``model`` has no ``encoder``, ``decoder`` and ``model_config``.
        ValueError: a reconstruction loss that is no likelihood; at the first evaluation, an encoder without a Gaussian
            posterior (pythae's AE, WAE, VQVAE, SVAE).
    """
    for name in ("encoder", "decoder", "model_config"):
        if not hasattr(model, name):
            raise TypeError(
                f"from_pythae: model: expected a pythae model, got {type(model).__name__} without {name}"
            )
    config = model.model_config
    if getattr(model, "model_name", None) == "BetaVAE":
        options.setdefault("beta", config.beta)
    options.setdefault("latent_dim", config.latent_dim)
    return model_class(
        SelectOutputs(model.encoder, "embedding", "log_covariance"),
        SelectOutputs(model.decoder, "reconstruction"),
        likelihood_of(config) if likelihood is None else likelihood,
        **options,
    )
