"""Every model, small, for the tests of what torch and other libraries do with a model."""

from __future__ import annotations

from collections.abc import Callable

import torch
from model_problems import DIM, PIXELS, data, mlp, seeded
from torch import Tensor, nn

import fastvae
from fastvae.models import BaseVAE
from fastvae.penalties import BetaAnnealing, Consistency, JacobianL1


def _networks() -> tuple[nn.Module, nn.Module]:
    return mlp(PIXELS, 2 * DIM), mlp(DIM, PIXELS)


def _penalties() -> list[nn.Module]:
    return [JacobianL1(0.1), BetaAnnealing(anneal_steps=10)]


def shifted(x: Tensor) -> Tensor:
    """A view without randomness: two processes and one see the same."""
    return x.roll(1, -1)


# "ignore": what torch.compile and torch.export need; the other choices look at the numbers.
BUILDERS: dict[str, Callable[[], BaseVAE]] = {
    "VAE": lambda: fastvae.VAE(*_networks()),
    "HVAE": lambda: fastvae.HVAE(*_networks(), num_steps=3, on_divergence="ignore"),
    "JacobianL1VAE": lambda: fastvae.JacobianL1VAE(*_networks(), gamma=0.1),
    "IWAE": lambda: fastvae.IWAE(*_networks(), num_samples=3),
    "ConsistencyVAE": lambda: fastvae.ConsistencyVAE(*_networks(), augment=shifted),
    "VAE with a view and a Jacobian penalty": lambda: fastvae.VAE(
        *_networks(), penalties=[Consistency(shifted, 0.5), JacobianL1(0.1)]
    ),
    "HVAE with penalties": lambda: fastvae.HVAE(
        *_networks(), num_steps=3, on_divergence="ignore", penalties=_penalties()
    ),
}


def build(name: str) -> BaseVAE:
    torch.manual_seed(0)
    return BUILDERS[name]()


def noise_for(model: BaseVAE, x: Tensor) -> Tensor:
    return model.draw_noise(model.encode(x)[0].detach(), seeded())


def gradients(model: BaseVAE, losses: Tensor) -> dict[str, Tensor]:
    """The gradient of the mean loss to every parameter, which all have one."""
    names, parameters = zip(*model.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(losses.mean(), parameters), strict=True))


__all__ = ["BUILDERS", "build", "data", "gradients", "noise_for"]
