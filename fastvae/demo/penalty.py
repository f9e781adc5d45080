"""A VAE with the Jacobian penalty beside one without: on three dots, and on the images of the demonstration."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fastvae.data import FactorSpace, binarize, three_dots
from fastvae.demo.problem import Problem, dense_networks
from fastvae.demo.training import train_in_turns
from fastvae.metrics import local_codes, mig, modularity
from fastvae.models import VAE, BaseVAE
from fastvae.ops import jacobian_l1
from fastvae.penalties import BetaAnnealing, JacobianL1VAE
from fastvae.training import History

__all__ = ["Member", "Pair", "train_pairs"]

LATENTS = 10
GAMMA = 0.02
ANNEAL_STEPS = 400
RHOS = (0.1, 1.0)

# Three dots learn more slowly than small digits: they get the larger part of the time.
_DOTS_SHARE = 2 / 3
# Larger than the paper's in smaller images, for the same reason.
_DOTS, _DOTS_SIZE, _DOTS_RADIUS = 5000, 16, 0.15
_CLUSTER_POINTS, _CLUSTERS = 5000, 20
_HELD_OUT = 100


@dataclass
class Member:
    """One of the two models, and what was measured of it on held-out images."""

    name: str
    model: BaseVAE
    history: History
    elbo: float
    """Mean over images, nats."""
    jacobian: float
    """Mean over images of sum |dy/dz|, y the means of the pixels."""
    local: dict[float, tuple[float, float]]
    """Local MIG and local modularity by rho, where the factors are known."""

    @property
    def milliseconds(self) -> float:
        """Of a training step, with its share of the passes over held-out images."""
        return 1e3 * sum(self.history.seconds) / self.history.steps[-1]


@dataclass
class Pair:
    """Two models trained on the same images in the same order, from the same weights."""

    name: str
    held_out: Tensor
    """[M, C, H, W] binary."""
    factors: tuple[int, ...] | None
    """Numbers of values of the factors, where they are known."""
    plain: Member
    penalised: Member

    @property
    def members(self) -> tuple[Member, Member]:
        """Without and with the penalty."""
        return self.plain, self.penalised


def train_pairs(problem: Problem, epochs: int, seconds: float, seed: int) -> list[Pair]:
    """Train and measure the pair on three dots and the pair on ``problem``'s images.

    Args:
        problem: images; networks, learning rate and numbers of images are those of this comparison.
        epochs: at most, of each.
        seconds: wall-clock time of all four trainings, approximately at most.
        seed: of weights, shuffling and noise, and of the dots.
    """
    dots = three_dots(_DOTS + _HELD_OUT, size=_DOTS_SIZE, radius=_DOTS_RADIUS, seed=seed)
    train, held_out = (part.tensors()[0] for part in dots.split(_DOTS, _HELD_OUT, seed=seed))
    of_dots = replace(
        problem,
        name="three dots",
        train=train,
        held_out=binarize(held_out, torch.Generator().manual_seed(seed)),
        held_out_grey=held_out,
        held_out_in_all=_HELD_OUT,
    )
    of_images = replace(problem, held_out=problem.held_out[:_HELD_OUT])
    return [
        _train_pair(of_dots, epochs, _DOTS_SHARE * seconds, seed, dots.space),
        _train_pair(of_images, epochs, (1 - _DOTS_SHARE) * seconds, seed, None),
    ]


def _train_pair(problem: Problem, epochs: int, seconds: float, seed: int, space: FactorSpace | None) -> Pair:
    problem = replace(problem, curve_draws=1, learning_rate=2e-3, epoch_limit=1000, batch_size=64)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        networks = dense_networks(problem.train.shape[1:], LATENTS, 256)
    models: dict[str, BaseVAE] = {
        "VAE": VAE(*copy.deepcopy(networks), penalties=[BetaAnnealing(ANNEAL_STEPS)]),
        "JL1-VAE": JacobianL1VAE(*networks, gamma=GAMMA, anneal_steps=ANNEAL_STEPS),
    }
    label = f"Jacobian penalty, {problem.name}"
    histories, _ = train_in_turns(models, problem, epochs, seconds, seed, label)
    members = [_measure(name, model, histories[name], problem, seed, space) for name, model in models.items()]
    return Pair(
        problem.name, problem.held_out, None if space is None else space.sizes, members[0], members[1]
    )


@torch.no_grad()
def _measure(
    name: str, model: BaseVAE, history: History, problem: Problem, seed: int, space: FactorSpace | None
) -> Member:
    step = model.objective(problem.held_out, beta=1.0, generator=torch.Generator().manual_seed(seed))
    jacobian = jacobian_l1(model.decoder, step.z, output="sigmoid")
    local: dict[float, tuple[float, float]] = {}
    for rho in RHOS if space is not None else ():
        assert space is not None
        options = {"num_points": _CLUSTER_POINTS, "num_clusters": _CLUSTERS, "seed": seed}
        scores = [
            (mig(codes, factors, bins=5), modularity(codes, factors, bins=5))
            for codes, factors in local_codes(model, space, rho, **options)
        ]
        means = torch.tensor(scores, dtype=torch.float64).mean(0).tolist()
        local[rho] = (means[0], means[1])
    return Member(name, model, history, -float(step.loss.double().mean()), float(jacobian), local)
