"""Energies along the leapfrog trajectories of a trained Hamiltonian VAE."""

from __future__ import annotations

import torch
from torch import Tensor

from fastvae.models import HVAE
from fastvae.models.base import reparameterize
from fastvae.ops import trajectory

__all__ = ["energy", "start"]


@torch.no_grad()
def energy(model: HVAE, x: Tensor, seed: int, *, tempered: bool) -> Tensor:
    """H of every point of one trajectory of each x, in nats: [K + 1, B].

    The trajectory starts where the model's own would: z_0 ~ q(z | x), rho_0 = gamma / sqrt(beta_0).

    Args:
        model: a trained model with K steps.
        x: [B, ...].
        seed: of start and momentum.
        tempered: False sets all alpha to 1, for the same start.
    """
    z, rho = start(model, x, seed)
    alpha = model.alpha if tempered else torch.ones_like(model.alpha)
    return trajectory(model.decoder, z, rho, x, model.step_size, alpha, model.likelihood).energy()


def start(model: HVAE, x: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """z_0 and rho_0, each [B, d], for each x [B, ...], detached."""
    with torch.no_grad():
        mu, logvar = model.encode(x)
        noise = model.draw_noise(mu, torch.Generator().manual_seed(seed))
        return reparameterize(mu, logvar, noise[0]), noise[1] * model.beta_0.rsqrt()
