"""Likelihood regret one image at a time, as it was published: the oracle of the tests, a rival in the benchmarks."""

from __future__ import annotations

import torch
from torch import Tensor

from fastvae.arguments import given
from fastvae.models.base import BaseVAE, NoiseSource
from fastvae.private import private_copy

__all__ = ["refit_one"]


def refit_one(
    model: BaseVAE,
    x: Tensor,
    noise: NoiseSource,
    *,
    num_steps: int = 100,
    lr: float = 2e-4,
    betas: tuple[float, float] = (0.9, 0.999),
    weight_decay: float = 5e-5,
    condition: Tensor | None = None,
    weight: Tensor | None = None,
) -> tuple[BaseVAE, Tensor]:
    """Train a private copy of the encoder on one image by ``torch.optim.Adam``.

    Xiao, Yan, Amit, Likelihood Regret, NeurIPS 2020, section 4: all parameters of the encoder, the decoder
    fixed, reconstruction + KL (``model.objective`` with beta = 1), one draw of noise a step.

    Args:
        model: in eval mode; left as it is.
        x: one image, [1, ...].
        noise: of the steps, the draw's number being that of the step from 0; see ``fastvae.noise``.
        num_steps, lr, betas, weight_decay: of Adam; the paper's by default.
        condition: [1, ...] of a conditional model.
        weight: [1, ...] of x's elements.

    Returns:
        The model with the private encoder, and the loss before each step, [num_steps].
    """
    besides = given(condition=condition, weight=weight)
    private = private_copy(model)
    private.requires_grad_(False)
    for parameter in private.encoder.parameters():
        parameter.requires_grad_()
    optimizer = torch.optim.Adam(private.encoder.parameters(), lr=lr, betas=betas, weight_decay=weight_decay)
    with torch.no_grad():
        like = private.encode(x, **besides)[0]
    losses = []
    for step in range(num_steps):
        optimizer.zero_grad()
        noise_of_step = noise(step, 1, like)[:, 0]
        loss = private.objective(x, beta=1.0, noise=noise_of_step, **besides).loss.sum()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return private, torch.stack(losses)
