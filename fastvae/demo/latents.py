"""What single latents do to an image: traversals, and columns of the decoder's Jacobian."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from fastvae.models import BaseVAE

__all__ = ["informative", "jacobian_columns", "traversals"]


@torch.no_grad()
def informative(model: BaseVAE, x: Tensor) -> Tensor:
    """The latents by how much q(z | x) differs from the prior, mean over x: int64 [d], most first."""
    mu, logvar = model.encode(x)
    return (mu.square() + logvar.exp() - logvar).mean(0).argsort(descending=True)


@torch.no_grad()
def traversals(model: BaseVAE, x: Tensor, lines: int, columns: int) -> Tensor:
    """The image x [1, ...] as its code moves from -2.5 to 2.5 along one latent: [lines * columns, ...].

    A line for each of the most informative latents.
    """
    z = model.encode(x[:1])[0].repeat(lines * columns, 1)
    latents = informative(model, x)[:lines].repeat_interleave(columns)
    z[torch.arange(len(z)), latents] = torch.linspace(-2.5, 2.5, columns).repeat(lines)
    return model.likelihood.mean(model.decode(z)).reshape(-1, *x.shape[1:])


@torch.no_grad()
def jacobian_columns(model: BaseVAE, x: Tensor, columns: int) -> Tensor:
    """d y / d z_i at the mean code of each x for the most informative i: [N * columns, ...] as x.

    y are the pixels' means, so that a column is itself an image.
    """
    latents = informative(model, x)[:columns]
    z = model.encode(x)[0]

    def decode(point: Tensor) -> Tensor:
        return model.likelihood.mean(model.decode(point))

    directions = F.one_hot(latents, z.shape[1]).to(z.dtype)
    found = [torch.func.jvp(decode, (z,), (direction.expand_as(z),))[1] for direction in directions]
    return torch.stack(found, 1).reshape(-1, *x.shape[1:])
