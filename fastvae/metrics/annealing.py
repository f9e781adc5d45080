"""Annealed chains of Hamiltonian transitions, from an initial density to a posterior and back."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from fastvae.models import BaseVAE
from fastvae.models.observation import Observation
from fastvae.noise import Stream
from fastvae.ops.log_px_and_force import function_of_codes

__all__ = ["Bridge", "adapted_steps", "annealed", "temperatures"]

# Wu et al. (2017): temperatures are sigmoids of equidistant numbers from -4 to 4.
_SIGMOID_RANGE = 4.0
# The longest trajectory in coordinates in which the initial density is N(0, I): a quarter of its period.
_LONGEST = math.pi / 2
_JITTER = 0.2
_GAIN = 0.1


def temperatures(count: int, schedule: str) -> Tensor:
    """Inverse temperatures from 0 to 1, float64 [count]."""
    grid = torch.linspace(-1, 1, count, dtype=torch.float64, device="cpu")
    if schedule == "sigmoid":
        grid = torch.sigmoid(_SIGMOID_RANGE * grid)
    scaled: Tensor = (grid - grid[0]) / (grid[-1] - grid[0])
    return scaled


class State(NamedTuple):
    """Codes u [rows, d] with r(u) in float64 [rows] and its gradient [rows, d]."""

    code: Tensor
    log_ratio: Tensor
    gradient: Tensor

    def where(self, accepted: Tensor, other: State) -> State:
        """This where ``accepted`` [rows], else the other."""
        column = accepted[:, None]
        return State(
            torch.where(column, self.code, other.code),
            torch.where(accepted, self.log_ratio, other.log_ratio),
            torch.where(column, self.gradient, other.gradient),
        )


class Bridge:
    """The densities between an initial q(z) = N(mean, scale^2) and p(x, z), of rows of samples.

    In u = (z - mean) / scale they are N(u; 0, I) exp(b r(u)) with r = log p(x, z) - log q(z), b from 0 to 1: r and its
    gradient do not depend on b. Without ``initial``, q is the prior and r is log p(x | z).

    Args:
        model: a private copy.
        start: u [rows, d].
        observation: of the rows.
        initial: mean and scale, [rows, d] each.
    """

    def __init__(
        self,
        model: BaseVAE,
        start: Tensor,
        observation: Observation,
        initial: tuple[Tensor, Tensor] | None,
    ) -> None:
        self.start, self.initial = start, initial
        self._log_px_and_force = function_of_codes(
            model.decoder, start, observation.x, model.likelihood, **observation.given
        )

    def at(self, code: Tensor) -> State:
        """r(u) and its gradient: one forward and one reverse sweep of the decoder."""
        if self.initial is None:
            log_px, force = self._log_px_and_force(code)
            return State(code, log_px.double(), force)
        mean, scale = self.initial
        z = mean + scale * code
        log_px, force = self._log_px_and_force(z)
        # log p(z) - log q(z), whose constants cancel.
        of_prior = 0.5 * (code.double().square() - z.double().square()).sum(1) + scale.double().log().sum(1)
        return State(code, log_px.double() + of_prior, scale * (force - z) + code)

    def moved(
        self, state: State, temperature: Tensor, step: Tensor, stream: Stream, num_steps: int
    ) -> tuple[State, Tensor]:
        """A Hamiltonian transition that leaves the density at ``temperature`` as it is.

        Noise by row: d numbers of the momentum, then two uniform ones, of the step size and of acceptance.

        Args:
            step: [rows], drawn anew from 0.8 to 1.2 of it, so that no trajectory is a whole number of periods.

        Returns:
            The next state, and the probability [rows] with which the end of the trajectory was accepted.
        """
        momentum = stream.normal(state.code.shape[1:]).to(state.code)
        uniform = stream.uniform((2,))
        eps = (step * (1 - _JITTER + 2 * _JITTER * uniform[:, 0])).to(state.code)[:, None]
        b = temperature.to(state.code)
        before = _log_density(state, temperature, momentum)
        proposal, half = state, eps / 2
        for _ in range(num_steps):
            momentum = momentum + half * (b * proposal.gradient - proposal.code)
            proposal = self.at(proposal.code + eps * momentum)
            momentum = momentum + half * (b * proposal.gradient - proposal.code)
        gain = _log_density(proposal, temperature, momentum) - before
        # A trajectory that left the finite range has a NaN, which no comparison accepts.
        moved = proposal.where(uniform[:, 1].log() < gain, state)
        return moved, gain.clamp(max=0).exp().nan_to_num(0)


def _log_density(state: State, temperature: Tensor, momentum: Tensor) -> Tensor:
    """Of code and momentum, up to a constant: float64 [rows]."""
    squares = state.code.double().square().sum(1) + momentum.double().square().sum(1)
    return temperature * state.log_ratio - 0.5 * squares


def annealed(
    bridge: Bridge,
    ladder: Tensor,
    steps: Tensor,
    stream: Stream,
    num_steps: int,
    ticks: Iterator[object],
) -> tuple[Tensor, Tensor]:
    """log weights, float64 [rows], of chains along a ladder, up or down, and their mean acceptance [rows].

    A weight is the product of ratios of neighbouring densities at the chain's codes (Neal 2001, eq. 3); the chain moves
    at all temperatures of the ladder but the first and the last.

    Args:
        bridge: with a draw from the density of the ladder's first temperature as its start.
        ladder: float64 [T], on the device.
        steps: [T - 2, rows].
        ticks: one is taken at each transition.
    """
    state = bridge.at(bridge.start)
    log_weight = torch.zeros_like(state.log_ratio)
    acceptance = torch.zeros_like(log_weight)
    for place, (change, temperature) in enumerate(zip(ladder.diff(), ladder[1:], strict=True)):
        log_weight += change * state.log_ratio
        if place < len(steps):
            state, accepted = bridge.moved(state, temperature, steps[place], stream, num_steps)
            acceptance += accepted
            next(ticks)
    return log_weight, acceptance / max(1, len(steps))


def adapted_steps(
    bridge: Bridge,
    ladder: Tensor,
    stream: Stream,
    num_steps: int,
    target: float,
    chains: int,
    ticks: Iterator[object],
) -> Tensor:
    """Step sizes that chains of a preliminary run were accepted with about as often as ``target``: [T - 2, images].

    The chains of an image stand side by side and share its step size, whose logarithm follows their acceptance
    (Robbins and Monro).
    """
    state = bridge.at(bridge.start)
    longest = math.log(_LONGEST / num_steps)
    step = torch.full_like(state.log_ratio[::chains], longest)
    found = []
    for temperature in ladder[1:-1]:
        each = step.exp().repeat_interleave(chains)
        state, accepted = bridge.moved(state, temperature, each, stream, num_steps)
        found.append(step)
        step = (step + _GAIN * (accepted.view(-1, chains).mean(1) - target)).clamp(max=longest)
        next(ticks)
    return torch.stack(found).exp()
