"""The Jacobian L1 penalty by differences and by PyTorch's forward mode."""

from __future__ import annotations

import torch
from torch import Tensor, nn

STEP = 1e-3
JVP_LATENTS = 5


def looped_differences(decoder: nn.Module, z: Tensor) -> Tensor:
    base = decoder(z)
    total = base.new_zeros(())
    for i in range(z.shape[1]):
        shifted = z.clone()
        shifted[:, i] += STEP
        total = total + ((decoder(shifted) - base) / STEP).abs().sum()
    return total / len(z)


def batched_differences(decoder: nn.Module, z: Tensor) -> Tensor:
    shifted = z + STEP * torch.eye(z.shape[1], device=z.device, dtype=z.dtype)[:, None]
    images = decoder(torch.cat([z, shifted.flatten(0, 1)]))
    base, moved = images[: len(z)], images[len(z) :].unflatten(0, shifted.shape[:2])
    return ((moved - base) / STEP).abs().sum() / len(z)


def forward_mode(decoder: nn.Module, z: Tensor) -> Tensor:
    jacobian = torch.func.vmap(torch.func.jacfwd(lambda point: decoder(point[None])[0]))(z)
    return jacobian.abs().sum() / len(z)


def chunked_jvp(decoder: nn.Module, z: Tensor) -> Tensor:
    total = z.new_zeros(())
    directions = torch.eye(z.shape[1], device=z.device, dtype=z.dtype)
    for chunk in directions.split(JVP_LATENTS):
        tangents = chunk[:, None].expand(-1, len(z), -1).flatten(0, 1)
        total = total + torch.func.jvp(decoder, (z.repeat(len(chunk), 1),), (tangents,))[1].abs().sum()
    return total / len(z)
