"""Annealed importance sampling of log p(x), with forces by autograd."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

LEAPFROG_STEPS = 10

LogPx = Callable[[Tensor, Tensor], Tensor]
Noise = Sequence[tuple[Tensor, Tensor]]


def log_px_of(decoder: Callable[[Tensor], Tensor]) -> LogPx:
    """log p(x | z) [rows] of Bernoulli pixels."""

    def log_px(z: Tensor, x: Tensor) -> Tensor:
        return -F.binary_cross_entropy_with_logits(decoder(z), x, reduction="none").flatten(1).sum(1)

    return log_px


def log_px_and_force(log_px: LogPx, z: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    z = z.detach().requires_grad_(True)
    found = log_px(z, x)
    return found.detach(), torch.autograd.grad(found.sum(), z)[0]


def half_squares(*tensors: Tensor) -> Tensor:
    return 0.5 * torch.cat(tensors, 1).double().square().sum(1)


def careful(log_px: LogPx, x: Tensor, start: Tensor, noise: Noise, ladder: Tensor, steps: Tensor) -> Tensor:
    """log weights [rows]; a force for each leapfrog step, none for a temperature."""
    z, (value, force) = start, log_px_and_force(log_px, start, x)
    log_weight = torch.zeros(len(x), dtype=torch.float64, device=x.device)
    for t, change in enumerate(ladder.diff().tolist()):
        log_weight += change * value.double()
        if t == len(noise):
            break
        b, (rho, uniform) = float(ladder[t + 1]), noise[t]
        eps = (steps[t] * (0.8 + 0.4 * uniform[:, 0])).to(z)[:, None]
        end, momentum, of_end, push = z, rho, value, force
        for _ in range(LEAPFROG_STEPS):
            momentum = momentum + eps / 2 * (b * push - end)
            end = end + eps * momentum
            of_end, push = log_px_and_force(log_px, end, x)
            momentum = momentum + eps / 2 * (b * push - end)
        gain = b * (of_end.double() - value.double()) - half_squares(end, momentum) + half_squares(z, rho)
        accepted = uniform[:, 1].log() < gain
        z, force = (torch.where(accepted[:, None], new, old) for new, old in ((end, z), (push, force)))
        value = torch.where(accepted, of_end, value)
    return log_weight


def textbook(log_px: LogPx, x: Tensor, start: Tensor, noise: Noise, ladder: Tensor, steps: Tensor) -> Tensor:
    """The same by functions of a density at a temperature, as the algorithm is usually written down."""

    def log_density(z: Tensor, b: Tensor) -> Tensor:
        return b * log_px(z, x).double() - half_squares(z)

    def force(z: Tensor, b: Tensor) -> Tensor:
        return b.to(z) * log_px_and_force(log_px, z, x)[1] - z

    z, log_weight = start, torch.zeros(len(x), dtype=torch.float64, device=x.device)
    for t in range(len(ladder) - 1):
        with torch.no_grad():
            log_weight += log_density(z, ladder[t + 1]) - log_density(z, ladder[t])
        if t == len(noise):
            break
        b, (rho, uniform) = ladder[t + 1], noise[t]
        eps = (steps[t] * (0.8 + 0.4 * uniform[:, 0])).to(z)[:, None]
        end, momentum = z, rho + eps / 2 * force(z, b)
        for k in range(LEAPFROG_STEPS):
            end = end + eps * momentum
            momentum = momentum + (eps if k < LEAPFROG_STEPS - 1 else eps / 2) * force(end, b)
        with torch.no_grad():
            gain = log_density(end, b) - half_squares(momentum) - log_density(z, b) + half_squares(rho)
        z = torch.where((uniform[:, 1].log() < gain)[:, None], end, z)
    return log_weight
