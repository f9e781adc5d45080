"""A VAE with consistency regularisation beside one without, on the images of the demonstration."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fastvae.data import Compose, RandomAffine, binarize
from fastvae.demo.problem import Problem, dense_networks
from fastvae.demo.training import train_in_turns
from fastvae.metrics import active_units, mutual_information
from fastvae.models import VAE, BaseVAE
from fastvae.ops import gaussian_kl
from fastvae.penalties import ConsistencyVAE
from fastvae.training import History

__all__ = ["Twin", "Twins", "train_twins"]

LATENTS = 10
WEIGHT = 0.1
# Images over which mutual information and active units are taken, at most.
_IMAGES = 1000
_HELD_OUT = 100


@dataclass
class Twin:
    """One of the two models, and what was measured of it."""

    name: str
    model: BaseVAE
    history: History
    elbo: float
    """Mean over held-out images, nats."""
    divergence: float
    """Mean over held-out images of KL(q(z | x~) || q(z | x)), nats."""
    information: float
    """Mutual information of ``Twins.images`` training images and codes, nats."""
    active: int
    """Latents of ``LATENTS`` that vary between those images."""
    means: Tensor
    """[2, M, d] the means of q for the held-out images and for their views."""


@dataclass
class Twins:
    """Two models trained on the same images in the same order, from the same weights."""

    held_out: Tensor
    """[M, C, H, W] binary."""
    views: Tensor
    """[M, C, H, W] a view of each."""
    images: int
    """Training images over which mutual information and active units are taken."""
    plain: Twin
    consistent: Twin

    @property
    def members(self) -> tuple[Twin, Twin]:
        """Without and with consistency."""
        return self.plain, self.consistent


def train_twins(problem: Problem, epochs: int, seconds: float, seed: int) -> Twins:
    """Train and measure both.

    Args:
        problem: images; networks and learning rate are those of this comparison.
        epochs: at most, of each.
        seconds: wall-clock time of both trainings, approximately at most.
        seed: of weights, shuffling, noise and views.
    """
    held_out = problem.held_out[:_HELD_OUT]
    problem = replace(problem, held_out=held_out, curve_draws=1, learning_rate=2e-3, epoch_limit=1000)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        networks = dense_networks(problem.train.shape[1:], LATENTS, 128)
    augment = Compose(RandomAffine(), binarize)
    models: dict[str, BaseVAE] = {
        "VAE": VAE(*copy.deepcopy(networks)),
        "CR-VAE": ConsistencyVAE(*networks, augment=augment, consistency=WEIGHT),
    }
    histories, _ = train_in_turns(models, problem, epochs, seconds, seed, "consistency")
    generator = torch.Generator().manual_seed(seed)
    views = augment(held_out, generator)
    train = binarize(
        problem.train[torch.randperm(len(problem.train), generator=generator)[:_IMAGES]], generator
    )
    members = [
        _measure(name, model, histories[name], held_out, views, train, seed) for name, model in models.items()
    ]
    return Twins(held_out, views, len(train), members[0], members[1])


@torch.no_grad()
def _measure(
    name: str, model: BaseVAE, history: History, x: Tensor, views: Tensor, train: Tensor, seed: int
) -> Twin:
    q, q_view = model.encode(x), model.encode(views)
    elbo = model.elbo(x, generator=torch.Generator().manual_seed(seed))
    return Twin(
        name,
        model,
        history,
        float(elbo.double().mean()),
        float(gaussian_kl(*q_view, *q).double().mean()),
        mutual_information(model, train, seed=seed),
        active_units(model, train),
        torch.stack([q[0], q_view[0]]),
    )
