"""Small models and data that the tests of the models share."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fastvae.likelihoods import Gaussian, Likelihood
from fastvae.models import HVAE, VAE, BaseVAE

DIM, PIXELS = 2, 6


def mlp(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(inputs, 16), nn.Softplus(), nn.Linear(16, outputs))


def make(kind: type[BaseVAE], likelihood: str | Likelihood = "bernoulli", **options: Any) -> BaseVAE:
    torch.manual_seed(0)
    values = 256 if likelihood == "categorical" else 1
    if kind is HVAE:
        options = {"num_steps": 3, **options}
    return kind(mlp(PIXELS, 2 * DIM), mlp(DIM, PIXELS * values), likelihood, **options)


def data(batch: int = 5, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.rand(batch, PIXELS, generator=torch.Generator().manual_seed(1), dtype=dtype)


def seeded(seed: int = 7, device: torch.device | str = "cpu") -> torch.Generator:
    return torch.Generator(device).manual_seed(seed)


MODELS = [VAE, HVAE]


class Skip(nn.Module):
    """A decoder that is no list of layers: autograd has to do."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(DIM, DIM), nn.Linear(DIM, PIXELS)

    def forward(self, z: Tensor) -> Tensor:
        return self.second(z + torch.tanh(self.first(z)))


def linear_gaussian(
    kind: type[BaseVAE], scale: float = 0.6, **options: Any
) -> tuple[BaseVAE, Tensor, Tensor]:
    """A model with x ~ N(b, W W^T + scale^2 I), data and their exact log evidence."""
    torch.manual_seed(4)
    encoder, decoder = nn.Linear(PIXELS, 2 * DIM), nn.Linear(DIM, PIXELS)
    model = kind(encoder, decoder, Gaussian(scale), **options).double()
    x = data(3, torch.float64)
    weight, bias = decoder.weight.detach(), decoder.bias.detach()
    covariance = weight @ weight.T + scale**2 * torch.eye(PIXELS, dtype=torch.float64)
    exact = torch.distributions.MultivariateNormal(bias, covariance).log_prob(x)
    return model, x, exact


def weights_of(model: BaseVAE, x: Tensor, count: int) -> Tensor:
    with torch.no_grad():
        mu, logvar = model.encode(x)
        g = seeded()
        noise = torch.stack([model.draw_noise(mu, g) for _ in range(count)], 1)
        flat = noise.reshape(model.noise_draws, -1, DIM)
        logs = model.log_weight(x.repeat(count, 1), mu.repeat(count, 1), logvar.repeat(count, 1), flat)
        return logs.reshape(count, len(x))
