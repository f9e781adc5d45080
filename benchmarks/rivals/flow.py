"""The Hamiltonian flow for memory formats and compilers."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def channels_last(decoder: nn.Module) -> nn.Module:
    """A copy with the weights of its convolutions in channels_last, which their results follow."""
    network = copy.deepcopy(decoder)
    for parameter in network.parameters():
        if parameter.dim() == 4:
            parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
    return network


def functional_flow(
    decoder: nn.Module, z: Tensor, rho: Tensor, x: Tensor, step_size: Tensor, alpha: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """fastvae.reference.hamiltonian_flow for a Bernoulli likelihood, as torch.compile can read it.

    The eager code does not compile (torch 2.13): under ``fullgraph=True`` Dynamo stops at the reference's
    ``torch.is_inference_mode_enabled()``, and would at ``torch.autograd.grad``; with graph breaks the forward pass
    runs, and the backward pass raises "torch.compile with aot_autograd does not currently support double backward".
    A force by ``torch.func`` compiles whole.
    """

    def log_px(point: Tensor) -> tuple[Tensor, Tensor]:
        logits = decoder(point).flatten(1)
        per_sample = -F.binary_cross_entropy_with_logits(logits, x, reduction="none").sum(-1)
        return per_sample.sum(), per_sample

    def force(point: Tensor) -> tuple[Tensor, Tensor]:
        gradient, per_sample = torch.func.grad(log_px, has_aux=True)(point)
        return gradient - point, per_sample

    pull, value = force(z)
    for k in range(alpha.shape[0]):
        rho = rho + 0.5 * step_size[k] * pull
        z = z + step_size[k] * rho
        pull, value = force(z)
        rho = alpha[k] * (rho + 0.5 * step_size[k] * pull)
    return z, rho, value
