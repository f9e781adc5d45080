"""Which model ``fastvae train`` trains."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

import fastvae
from fastvae import likelihoods
from fastvae.architectures import image_networks
from fastvae.commands.runs import RunSettings
from fastvae.data import RandomAffine
from fastvae.models import BaseVAE

__all__ = ["LIKELIHOODS", "MODELS", "build_model"]

# A trajectory that diverges early in training should not end the run; it is counted.
MODELS: dict[str, tuple[Callable[..., BaseVAE], dict[str, Any]]] = {
    "vae": (fastvae.VAE, {}),
    "hvae": (fastvae.HVAE, {"num_steps": 5, "step_size": 0.05, "on_divergence": "drop"}),
    "iwae": (fastvae.IWAE, {"num_samples": 10}),
    "jacobian-l1": (fastvae.JacobianL1VAE, {"gamma": 0.1, "anneal_steps": 1000}),
    "consistency": (fastvae.ConsistencyVAE, {"augment": RandomAffine()}),
}
"""By name on the command line: class and arguments."""

LIKELIHOODS: dict[str, Callable[[], likelihoods.Likelihood]] = {
    "bernoulli": likelihoods.Bernoulli,
    "gaussian": lambda: likelihoods.Gaussian("learned", initial=0.2, min_scale=1e-2),  # type: ignore[arg-type,call-arg]
    "categorical": likelihoods.Categorical,
}
"""By name on the command line."""


def build_model(settings: RunSettings, shape: Sequence[int]) -> BaseVAE:
    """A model for images [C, H, W], its weights by the run's seed. ValueError for images that no network takes."""
    kind, options = MODELS[settings.model]
    likelihood = LIKELIHOODS[settings.likelihood]()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        encoder, decoder = image_networks(
            shape, settings.latent_dim, width=settings.width, values_per_element=likelihood.values_per_element
        )
    return kind(encoder, decoder, likelihood, beta=settings.beta, **options)
