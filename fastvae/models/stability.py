"""The step size at which leapfrog trajectories stay near their energy, measured at codes of data."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastvae.models.observation import Observation
from fastvae.modes import modes_kept
from fastvae.ops.log_px_and_force import log_px_and_force

if TYPE_CHECKING:
    from fastvae.models.hvae import HVAE

__all__ = ["encoding_mode", "largest_eigenvalues", "stable_step_size"]

_PRODUCTS = 12
"""Of Lanczos' iteration: the largest eigenvalue is known to some percent long before."""


def stable_step_size(model: HVAE, observation: Observation, generator: torch.Generator | None) -> float:
    """See ``HVAE.stable_step_size``."""
    x = observation.x
    if not len(x):
        raise ValueError("HVAE: stable_step_size: x: expected at least one sample")
    with encoding_mode(model), torch.inference_mode(False):
        with torch.no_grad():
            mu, logvar = model.encode(x, **observation.given)
            z = mu + torch.exp(logvar / 2) * model.draw_noise(mu, generator, 1)[0]
            start = model.draw_noise(mu, generator, 1)[0]

        def curved(direction: Tensor) -> Tensor:
            """-d^2 log p(x, z) / dz^2 times a direction; the prior's part is the identity."""
            with torch.enable_grad():
                at = z.detach().clone().requires_grad_()
                _, force = log_px_and_force(model.decoder, at, x, model.likelihood, **observation.given)
                (found,) = torch.autograd.grad((force * direction).sum(), at)
            return direction - found

        largest = float(largest_eigenvalues(curved, start).max())
    if largest != largest or largest == float("inf"):
        raise ValueError(
            "HVAE: stable_step_size: expected a finite curvature of log p(x, z) at the encoder's codes, got "
            f"{largest}: x, the encoder's or the decoder's outputs are not finite"
        )
    # Where the likelihood bends the other way, the prior sets the scale.
    return max(largest, 1.0) ** -0.5


@contextmanager
def encoding_mode(model: HVAE) -> Iterator[None]:
    """Every module in eval mode, in which encoding changes no statistics."""
    with modes_kept(model):
        # Not eval(), which a user's module may have a version of its own of.
        for module in model.modules():
            module.training = False
        yield


def largest_eigenvalues(product: Callable[[Tensor], Tensor], start: Tensor) -> Tensor:
    """The largest eigenvalue [B] of each of B symmetric matrices [d, d], by Lanczos' iteration.

    Args:
        product: directions [B, d] to their images.
        start: [B, d].
    """
    directions = [start / start.norm(dim=1, keepdim=True)]
    basis, images = start.new_empty(0), []
    for _ in range(min(_PRODUCTS, start.shape[1])):
        images.append(product(directions[-1]))
        basis = torch.stack(directions, 1)
        rest = images[-1]
        for _ in range(2):  # once more, for what rounding left
            rest = rest - torch.einsum("bk,bkd->bd", torch.einsum("bkd,bd->bk", basis, rest), basis)
        length = rest.norm(dim=1, keepdim=True)
        # Nothing new: the directions span all that the start reaches, and further ones add zeros.
        directions.append(
            torch.where(length > 1e-6 * images[-1].norm(dim=1, keepdim=True), rest / length, 0.0)
        )
    small = torch.einsum("bkd,bld->bkl", basis, torch.stack(images, 1))
    if not bool(small.isfinite().all()):
        return small.new_full((len(start),), float("nan"))
    return torch.linalg.eigvalsh((small + small.mT) / 2)[:, -1]
