"""Models whose influence the tests compute, and the gradients they compare with: materialised, by autograd."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fastvae.influence import TracIn
from fastvae.models import HVAE, VAE
from fastvae.noise import Stream, draws_of, key_of_weights, keys_of


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def images(count: int, *shape: int, seed: int = 1) -> Tensor:
    return torch.rand(count, *shape, generator=generator(seed), dtype=torch.float64)


def randomised(model: nn.Module) -> nn.Module:
    """In float64, with normalisation layers that do something."""
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
                module.running_mean.uniform_(-0.5, 0.5, generator=generator(2))  # type: ignore[union-attr]
                module.running_var.uniform_(0.5, 1.5, generator=generator(3))  # type: ignore[union-attr]
            norms = (nn.BatchNorm1d, nn.BatchNorm2d, nn.LayerNorm, nn.GroupNorm)
            if isinstance(module, norms) and module.weight is not None:
                module.weight.uniform_(0.5, 1.5, generator=generator(4))
                module.bias.uniform_(-0.5, 0.5, generator=generator(5))
    return model.double()


def mlp(*widths: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for before, after in itertools.pairwise(widths):
        layers += [nn.Linear(before, after), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def dense_vae() -> nn.Module:
    return VAE(mlp(20, 12, 8), mlp(4, 12, 20), beta=4.0)


def convolutional_vae() -> nn.Module:
    """The 64x64 networks in small: 4x4 stride-2 convolutions and transposed ones."""
    encoder = nn.Sequential(
        nn.Conv2d(1, 3, 4, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(3, 4, 4, stride=2, padding=1),
        nn.ReLU(inplace=True),
        nn.Flatten(),
        nn.Linear(16, 6),
    )
    decoder = nn.Sequential(
        nn.Linear(3, 16),
        nn.ReLU(inplace=True),
        nn.Unflatten(1, (4, 2, 2)),
        nn.ConvTranspose2d(4, 3, 4, stride=2, padding=1),
        nn.ReLU(),
        nn.ConvTranspose2d(3, 1, 4, stride=2, padding=1),
    )
    return VAE(encoder, decoder)


def normalised_vae() -> nn.Module:
    """BatchNorm, LayerNorm, GroupNorm; grouped, dilated, unevenly padded convolutions."""
    encoder = nn.Sequential(
        nn.Conv2d(2, 4, (3, 2), stride=(2, 1), padding=(1, 2), dilation=(1, 2), groups=2),
        nn.BatchNorm2d(4),
        nn.Softplus(),
        nn.Conv2d(4, 4, 3, padding="same", dilation=2, padding_mode="circular", bias=False),
        nn.GroupNorm(2, 4),
        nn.Flatten(),
        nn.LazyLinear(10),
        nn.LayerNorm(10),
        nn.Linear(10, 6),
        nn.BatchNorm1d(6),
    )
    decoder = nn.Sequential(
        nn.Linear(3, 12),
        nn.LayerNorm(12),
        nn.Unflatten(1, (4, 3, 1)),
        nn.ConvTranspose2d(4, 4, 3, stride=2, padding=1, output_padding=1, groups=2),
        nn.BatchNorm2d(4),
        nn.Softplus(),
        nn.ConvTranspose2d(4, 2, (2, 4), stride=1, padding=(1, 0), dilation=(2, 1), output_padding=(1, 0)),
        nn.AdaptiveAvgPool2d((6, 5)),
    )
    model = VAE(encoder, decoder, "gaussian", latent_dim=3)
    model.eval()
    model.encode(images(1, 2, 6, 5).float())
    return model


def hamiltonian_vae() -> nn.Module:
    return HVAE(mlp(20, 12, 8), mlp(4, 12, 20), num_steps=2)


SHAPES: dict[Callable[[], nn.Module], tuple[int, ...]] = {
    dense_vae: (20,),
    convolutional_vae: (1, 8, 8),
    normalised_vae: (2, 6, 5),
    hamiltonian_vae: (20,),
}


def build(make: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return randomised(make())


def no_checkpoint(model: nn.Module, checkpoint: Any) -> float:
    """Takes the number that stands in for a checkpoint as its weight."""
    return float(checkpoint)


def scaled(model: nn.Module, checkpoint: Any) -> float:
    """Takes the number that stands in for a checkpoint as a factor of all parameters, and as its weight."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(checkpoint)
    return float(checkpoint)


def tracin(model: nn.Module, train: Any, checkpoints: Any = (1.0,), **options: Any) -> TracIn:
    return TracIn(model, train, checkpoints, no_checkpoint, **{"num_samples": 3, **options})


def vae_gradients(model: Any, x: Tensor, draws: int, seed: int = 0) -> Tensor:
    """[B, S, P] the gradient of each draw of each sample, from the model's own forward pass; on the CPU."""
    model.eval()
    rows, like = [], next(model.parameters())
    for sample in x.split(1):
        for key in draws_of(keys_of(sample) ^ key_of_weights(model), seed, draws):
            noise = Stream(key[None]).normal((model.noise_draws, model.latent_dim)).to(like)
            loss = model(sample, noise=noise.transpose(0, 1))
            grads = torch.autograd.grad(loss.sum(), list(model.parameters()), materialize_grads=True)
            rows.append(torch.cat([grad.flatten() for grad in grads]))
    return torch.stack(rows).unflatten(0, (len(x), draws)).cpu()
