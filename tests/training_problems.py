"""A small model and loaders that the tests of training share."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from fastvae.training import fit


class TinyVAE(nn.Module):
    """The model contract in twenty lines: noise from the global generator, BatchNorm, annealed penalty."""

    def __init__(self, penalties: tuple[Any, ...] = ()) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 4))
        self.decoder = nn.Linear(2, 6)
        self.penalties = penalties

    def forward(self, x: Tensor) -> Tensor:
        mu, logvar = self.encoder(x).chunk(2, dim=1)
        z = mu + (logvar / 2).exp() * torch.randn_like(mu)
        fit_term = functional.binary_cross_entropy_with_logits(self.decoder(z), x, reduction="none").sum(1)
        loss = fit_term + 0.5 * (mu**2 + logvar.exp() - logvar - 1).sum(1)
        for penalty in self.penalties:
            loss = loss + penalty.weight() * mu.abs().sum(1)
        result: Tensor = loss
        return result


class Annealed:
    def __init__(self) -> None:
        self.count = 0

    def weight(self) -> float:
        return min(self.count / 10, 1.0)

    def step(self) -> None:
        self.count += 1

    def state_dict(self) -> dict[str, int]:
        return {"count": self.count}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.count = state["count"]


def images(count: int = 44, seed: int = 0) -> Tensor:
    return torch.rand(count, 6, generator=torch.Generator().manual_seed(seed))


def make(seed: int = 0, **kwargs: Any) -> TinyVAE:
    torch.manual_seed(seed)
    return TinyVAE(**kwargs)


def batches(data: Tensor | None = None, **kwargs: Any) -> DataLoader[Any]:
    kwargs = {"batch_size": 8, "shuffle": True, **kwargs}
    return DataLoader(TensorDataset(images() if data is None else data), **kwargs)


def weights(model: nn.Module) -> Tensor:
    return torch.cat([value.double().flatten() for value in model.state_dict().values()])


quiet_fit = functools.partial(fit, progress=False)
