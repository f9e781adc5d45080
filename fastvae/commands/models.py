"""Which model ``fastvae train`` trains."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

import fastvae
from fastvae import likelihoods
from fastvae.architectures import image_networks, table_networks
from fastvae.commands.runs import RunSettings
from fastvae.data import RandomAffine, TableDataset
from fastvae.models import BaseVAE

__all__ = ["LIKELIHOODS", "MODELS", "TABLE_LIKELIHOODS", "build_model", "likelihood_of", "start_at_means"]

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
    "gaussian": lambda: likelihoods.Gaussian("learned", initial=0.2, min_scale=1e-2),
    "categorical": likelihoods.Categorical,
}
"""Of images, by name on the command line."""

TABLE_LIKELIHOODS: dict[str, Callable[[int], likelihoods.Likelihood]] = {
    "bernoulli": lambda _: likelihoods.Bernoulli(),
    "gaussian": lambda columns: likelihoods.Gaussian(
        "learned",
        shape=(columns,),
        initial=0.5,
        min_scale=1e-2,
    ),
    "poisson": lambda _: likelihoods.Poisson(),
    "negative-binomial": lambda columns: likelihoods.NegativeBinomial(
        "learned",
        shape=(columns,),  # type: ignore[call-arg]
    ),
    "zero-inflated": lambda columns: likelihoods.ZeroInflatedNegativeBinomial(
        "learned",
        shape=(columns,),  # type: ignore[call-arg]
    ),
}
"""Of tables, by name on the command line: from the number of columns."""


def build_model(settings: RunSettings, shape: Sequence[int]) -> BaseVAE:
    """A model for images [C, H, W] or rows [F], its weights by the run's seed.

    ValueError for images that no network takes.
    """
    kind, options = MODELS[settings.model]
    is_table = len(shape) == 1
    named = settings.likelihood
    likelihood = TABLE_LIKELIHOODS[named](shape[0]) if is_table else LIKELIHOODS[named]()
    values = likelihood.values_per_element
    assert settings.latent_dim is not None and settings.width is not None
    networks: tuple[nn.Module, nn.Module]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        if is_table:
            networks = table_networks(
                shape[0],
                settings.latent_dim,
                width=settings.width,
                values_per_element=values,
                condition=settings.condition_dim,
                counts=named not in LIKELIHOODS,
            )
        else:
            networks = image_networks(
                shape, settings.latent_dim, width=settings.width, values_per_element=values
            )
    return kind(*networks, likelihood, beta=settings.beta, latent_dim=settings.latent_dim, **options)


def likelihood_of(table: TableDataset) -> str:
    """The one that suits its values: of 0 and 1, of counts, of other numbers."""
    values = table.values
    if bool(((values == 0) | (values == 1)).all()):
        return "bernoulli"
    return "negative-binomial" if bool(((values >= 0) & (values == values.round())).all()) else "gaussian"


@torch.no_grad()
def start_at_means(model: BaseVAE, table: TableDataset, likelihood: str) -> None:
    """Let the untrained decoder begin around the mean of each column: else counts take long to come near."""
    last = [module for module in model.decoder.modules() if isinstance(module, nn.Linear)][-1]
    mean = table.values.double().mean(0)
    if likelihood == "bernoulli":
        share = mean.clamp(1e-3, 1 - 1e-3)
        last.bias.copy_(share.logit())
    elif likelihood not in LIKELIHOODS:
        last.bias[: len(mean)] = mean.clamp_min(1e-3).log().to(last.bias)
