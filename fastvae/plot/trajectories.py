"""Energies along the leapfrog trajectories of a Hamiltonian VAE."""

from __future__ import annotations

import torch
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from fastvae.arguments import expect, given
from fastvae.metrics.posteriors import private_model
from fastvae.models import HVAE
from fastvae.models.base import reparameterize
from fastvae.ops import trajectory
from fastvae.plot.drawing import COLOURS, FONT, panels

__all__ = ["energies", "energy", "start"]


def energies(model: HVAE, x: Tensor, *, seed: int = 0, condition: Tensor | None = None) -> Figure:
    """The change of H = -log p(x | z) + |z|^2 / 2 + |rho|^2 / 2 over the leapfrog steps; the thick line is the median.

    At the left the flow as it was trained: each step multiplies the momentum by its alpha, which changes the energy. At
    the right the same start and step size with all alpha = 1, where exact dynamics would keep H: what is left is the
    error of the integrator.

    Args:
        model: an HVAE.
        x: [B, ...], a trajectory each.
        seed: of starts and momenta.
        condition: [B, ...] of a conditional model.

    Raises:
        TypeError: another model.
        ValueError: no samples.
    """
    expect(len(x) > 0, "plot.energies: x: expected at least one sample", "none")
    figure, (row,) = panels(1, 2, 2.3)
    for axis, title, tempered in zip(row, ("as trained", "without tempering"), (True, False), strict=True):
        values = energy(model, x, seed, tempered=tempered, condition=condition)
        change = (values - values[0]).cpu()
        steps = range(len(change))
        axis.plot(steps, change.numpy(), color=COLOURS[1], linewidth=0.6, alpha=0.25)
        axis.plot(steps, change.median(1).values, color=COLOURS[1], linewidth=2, marker="o", markersize=3)
        axis.set_title(title, size=FONT)
        axis.set_xlabel("leapfrog step")
        axis.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    row[0].set_ylabel("change of H, nats")
    return figure


@torch.no_grad()
def energy(model: HVAE, x: Tensor, seed: int, *, tempered: bool, condition: Tensor | None = None) -> Tensor:
    """H of every point of one trajectory of each x, in nats: [K + 1, B].

    The trajectory starts where the model's own would: z_0 ~ q(z | x), rho_0 = gamma / sqrt(beta_0).

    Args:
        model: an HVAE of K steps.
        x: [B, ...].
        seed: of start and momentum.
        tempered: False sets all alpha to 1, for the same start.
        condition: [B, ...] of a conditional model.
    """
    private = private_model("plot.energies", model)
    if not isinstance(private, HVAE):
        raise TypeError(f"plot.energies: model: expected an HVAE, got {type(private).__name__}")
    z, rho = start(private, x, seed, condition)
    alpha = private.alpha if tempered else torch.ones_like(private.alpha)
    points = trajectory(
        private.decoder, z, rho, x, private.step_size, alpha, private.likelihood, condition=condition
    )
    return points.energy()


def start(model: HVAE, x: Tensor, seed: int, condition: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """z_0 and rho_0, each [B, d], for each x [B, ...], detached."""
    with torch.no_grad():
        mu, logvar = model.encode(x, **given(condition=condition))
        noise = model.draw_noise(mu, torch.Generator().manual_seed(seed))
        return reparameterize(mu, logvar, noise[0]), noise[1] * model.beta_0.rsqrt()
