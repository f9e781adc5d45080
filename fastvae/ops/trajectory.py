"""Every point of the Hamiltonian flow's trajectory."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fastvae.likelihoods import Likelihood
from fastvae.ops.hamiltonian_flow import flow_and_points
from fastvae.reference import Trajectory


def trajectory(
    decoder: nn.Module,
    z: Tensor,
    rho: Tensor,
    x: Tensor,
    step_size: Tensor | float | Sequence[float],
    alpha: Tensor,
    likelihood: str | Likelihood = "bernoulli",
    *,
    condition: Tensor | None = None,
    weight: Tensor | None = None,
) -> Trajectory:
    """Every point of K tempered leapfrog steps, of which :func:`fastvae.ops.hamiltonian_flow` returns the last.

    For what is looked at and not trained: energies along the way, or the step at which a trajectory diverges.

    Args:
        decoder, z, rho, x, step_size, alpha, likelihood, condition, weight: see ``hamiltonian_flow``.

    Returns:
        A :class:`fastvae.reference.Trajectory` of z, rho [K + 1, B, d] and log_px [K + 1, B], none of which has a
        gradient; its method ``energy`` gives H of every point, [K + 1, B], in nats.

    Raises:
        ValueError, TypeError, CoupledSamples, NotImplementedError: as ``hamiltonian_flow``, in its name.
    """
    with torch.no_grad():
        points = flow_and_points(
            *(decoder, z, rho, x, step_size, alpha, likelihood, condition, weight),
            memory="recompute",
            keep_points=True,
        )[1]
    assert points is not None
    return points
