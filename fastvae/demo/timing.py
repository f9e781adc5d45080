"""Time per training step, measured on the trained models."""

from __future__ import annotations

import copy
import os
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fastvae import ops, reference
from fastvae.demo.trajectory import start
from fastvae.models import HVAE, VAE, BaseVAE

__all__ = ["Timing", "Timings", "measure"]

# Rounds go on until both are reached.
_ROUNDS, _SECONDS = 7, 3.0


@dataclass
class Timing:
    """Wall-clock times of one thing, in seconds."""

    seconds: list[float]

    def quantile(self, q: float) -> float:
        """The q-quantile, in seconds."""
        return float(torch.tensor(self.seconds, dtype=torch.float64).quantile(q))


@dataclass
class Timings:
    """What was timed, in rounds of one call each, so that all meet the same disturbances."""

    batch_size: int
    num_steps: int
    fused: Timing
    """Forward and backward of ``ops.hamiltonian_flow``."""
    eager: Timing
    """The same of ``reference.hamiltonian_flow``: autograd of autograd, K + 1 forces."""
    vae: Timing
    """A whole training step of the VAE: loss, backward, Adam."""
    hvae: Timing
    """A whole training step of the HVAE."""
    difference: float
    """Largest difference of the two flows' gradients, relative to the largest entry of each gradient."""
    load: float | None
    """Processes that wanted a CPU over the last minute, these included; None where the system does not say."""


def measure(vae: VAE, hvae: HVAE, x: Tensor, learning_rate: float, seed: int) -> Timings:
    """Time the flow by our operator and by eager autograd, and training steps of both models.

    Args:
        vae, hvae: models; they are not changed.
        x: a batch [B, ...] of zeros and ones.
        learning_rate: of the training steps.
        seed: of start and momentum.
    """
    fused, eager = (
        _flow(ops.hamiltonian_flow, hvae, x, seed),
        _flow(reference.hamiltonian_flow, hvae, x, seed),
    )
    difference = max(
        float((a - b).abs().max() / b.abs().max().clamp_min(torch.finfo(b.dtype).tiny))
        for a, b in zip(fused(), eager(), strict=True)
    )
    jobs: list[Callable[[], object]] = [
        fused,
        eager,
        _training_step(vae, x, learning_rate),
        _training_step(hvae, x, learning_rate),
    ]
    seconds: list[list[float]] = [[] for _ in jobs]
    for job in jobs:
        job()
    started = time.perf_counter()
    while len(seconds[0]) < _ROUNDS or time.perf_counter() - started < _SECONDS:
        for job, times in zip(jobs, seconds, strict=True):
            before = time.perf_counter()
            job()
            times.append(time.perf_counter() - before)
    flow, eager_flow, vae_step, hvae_step = (Timing(times) for times in seconds)
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    return Timings(len(x), hvae.num_steps, flow, eager_flow, vae_step, hvae_step, difference, load)


def _flow(
    flow: Callable[..., tuple[Tensor, ...]], model: HVAE, x: Tensor, seed: int
) -> Callable[[], tuple[Tensor, ...]]:
    """Forward and backward of a flow from the start that training would give it; returns its gradients."""
    own = (*start(model, x, seed), model.step_size, model.alpha)
    z, rho, step_size, alpha = (value.detach().requires_grad_() for value in own)
    inputs = [z, rho, step_size, alpha, *model.decoder.parameters()]

    def run() -> tuple[Tensor, ...]:
        z_end, rho_end, log_px = flow(model.decoder, z, rho, x, step_size, alpha, model.likelihood)
        value = log_px.sum() - 0.5 * (z_end.square().sum() + rho_end.square().sum())
        return torch.autograd.grad(value, inputs)

    return run


def _training_step(model: BaseVAE, x: Tensor, learning_rate: float) -> Callable[[], object]:
    own = copy.deepcopy(model).train()
    optimizer = torch.optim.Adam(own.parameters(), lr=learning_rate)

    def run() -> None:
        optimizer.zero_grad(set_to_none=True)
        own.loss(x).backward()
        optimizer.step()

    return run
