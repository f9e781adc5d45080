"""A step size that follows the energy error of the leapfrog trajectories that a model is trained on."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastvae._compiling import is_captured, is_compiling
from fastvae.arguments import expect, expect_numbers
from fastvae.decoding import transformed
from fastvae.models.observation import Observation
from fastvae.models.tempering import BoundedStepSize
from fastvae.ops.trajectory import trajectory
from fastvae.reference import Trajectory

if TYPE_CHECKING:
    from fastvae.models.hvae import HVAE

__all__ = ["HALVINGS", "AdaptedStepSize", "acceptance", "adapted_in_training", "conservation"]

_WARM_UP = 50
_INTERVAL = 8
"""Calls from one measurement to the next, after those of the warm-up, which are measured all."""
_GAIN, _LATER_GAIN = 0.1, 0.3
_START = 0.2
_FOUND, _LOST = 0.5, 0.05
"""Acceptance at which the search for a first limit ends, and below which another search begins."""
HALVINGS = 40
"""At most in a row, from 0.2 to 2e-13."""
_ABOVE = math.log(1.25)
"""How far the limit stays above a step size that it does not limit, so that it is near when it is needed."""


def conservation(points: Trajectory, alpha: Tensor) -> Tensor:
    """exp(-|error| / T) [B] of the leapfrog steps' error in the energy H along a trajectory; 0 where it diverged.

    A trajectory without error would change H by the tempering alone, |rho|^2/2 (1 - 1/alpha^2) a step. What is left is
    the error of the leapfrog steps. At T = 1 its exponential is the probability that HMC accepts the end of the
    trajectory from its start or the start from its end, whichever is smaller: away from equilibrium one of the two is 1
    however large the error is, where z_0 lies far above the posterior, say, and slides down.

    T = max(1, |rho|^2/d), the median over the points, is the temperature that the momenta show (equipartition): errors
    count in proportion to what is exchanged. Codes of an encoder that is far from trained have thousands of nats too
    much, of which a nat is nothing; in equilibrium T is 1, but for tempering.

    Args:
        points: of K steps.
        alpha: [K].
    """
    energy, squares = points.energy(), points.rho.square().sum(2)
    tempered = (1 - alpha.square().reciprocal())[:, None] * squares[1:] / 2
    error = (energy[-1] - energy[0] - tempered.sum(0)).abs()
    # Sums of large numbers differ by their rounding, however small the steps are.
    rounding = 8 * torch.finfo(energy.dtype).eps * energy.abs().amax(0)
    # Not the mean: momenta of a trajectory that diverges are as large as its error at the end, and only there.
    temperature = (squares.median(0).values / points.rho.shape[2]).clamp(min=1)
    return torch.nan_to_num((-(error - rounding).clamp(min=0) / temperature).exp(), nan=0.0)


def acceptance(
    model: HVAE, observation: Observation, mu: Tensor, logvar: Tensor, noise: Tensor
) -> Callable[[Tensor], Tensor]:
    """The mean acceptance [] of a batch of trajectories as a function of their step size []."""

    def of(eps: Tensor) -> Tensor:
        model.check_condition_of_flow(observation.condition)
        z_0, rho_0, alpha = model.start(mu, logvar, noise)
        points = trajectory(
            *(model.decoder, z_0, rho_0, observation.x, eps.to(mu.dtype), alpha, model.likelihood),
            **observation.given,
        )
        return conservation(points, alpha).mean()

    return of


def adapted_in_training(model: HVAE, mu: Tensor) -> AdaptedStepSize | None:
    """The step size of a model if it is adapted and this is training, where numbers can be looked at."""
    step = model.leapfrog_step
    if not (isinstance(step, AdaptedStepSize) and model.training and torch.is_grad_enabled()):
        return None
    return None if is_compiling() or transformed() or mu.is_meta else step


class AdaptedStepSize(BoundedStepSize):
    """A trained step size below a limit that is adapted to a target acceptance by stochastic approximation.

    The logarithm of the limit grows by gain (acceptance - target) at each measurement (Robbins and Monro 1951; for step
    sizes of Markov chains Andrieu and Thoms, "A tutorial on adaptive MCMC", 2008, section 4.2). The gain does not fall,
    as it would for a chain whose target stays: the posterior of a model in training gets narrower. Where the first
    step size, 0.2, is accepted less than half of the time, it is halved until it is more often (Hoffman and Gelman,
    "The No-U-Turn Sampler", 2014, Algorithm 4), and so is one that has lost all of its acceptance.

    The limit's state is in buffers, as BatchNorm's is. A step size that is accepted more often than the target is not
    limited, and not adapted either: longer steps are not better ones.

    Args:
        maximum: upper bound of both; see ``BoundedStepSize``.
        num_steps: K.
        learn: whether the step size below the limit is trained.
        target: acceptance, in (0, 1).

    Raises:
        ValueError: either number out of range.
    """

    log_limit: Tensor
    calls: Tensor

    def __init__(self, maximum: float, num_steps: int, learn: bool, target: float) -> None:
        expect_numbers("HVAE", target_acceptance=target)
        expect(0 < target < 1, "HVAE: target_acceptance: expected a number in (0, 1)", target)
        start = _START if not 0 < maximum <= 2 * _START else maximum / 2
        super().__init__(start, maximum, num_steps, None, learn)
        self.target = float(target)
        self.register_buffer("log_limit", torch.tensor(math.log(start) + _ABOVE))
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    def forward(self) -> Tensor:
        """The step size: []."""
        trained, limit = super().forward(), self.log_limit.exp()
        return torch.where(trained <= limit, trained, limit)

    def count(self, accepted: Callable[[Tensor], Tensor], like: Tensor) -> None:
        """Count a call before a loss of codes ``like`` [B, d], and adapt where it is due.

        In a CUDA graph it is only counted: whoever replays it runs the steps that are due as they are.
        """
        if len(like) and not is_captured(like) and self.is_due:
            self.adapt(accepted)
        else:
            self.calls += 1

    @property
    def is_due(self) -> bool:
        """Whether the next call is one that measures."""
        calls = int(self.calls)
        return calls < _WARM_UP or calls % _INTERVAL == 0

    @torch.no_grad()
    def adapt(self, accepted: Callable[[Tensor], Tensor]) -> Tensor:
        """Measure, adapt and count the call; the acceptance [] at the step size before.

        Args:
            accepted: the mean acceptance [] at a step size [].
        """
        calls = int(self.calls)
        found = now = accepted(self())
        if float(now) < (_FOUND if calls == 0 else _LOST):
            before = self.log_limit.clone()
            for _ in range(HALVINGS):
                self.halve()
                now = accepted(self())
                if float(now) > _FOUND:
                    break
            else:
                # It is not the step size: outputs that are NaN, say.
                self.log_limit.copy_(before)
        gain = _GAIN if calls < _WARM_UP else _LATER_GAIN
        moved = self.log_limit + gain * (now.to(self.log_limit) - self.target)
        self.log_limit.copy_(torch.minimum(moved, super().forward().log() + _ABOVE))
        self.calls += 1
        return found

    @torch.no_grad()
    def halve(self) -> None:
        """Half the step size from now on."""
        self.log_limit.copy_(self().log() - math.log(2))

    def extra_repr(self) -> str:
        """What ``repr`` says of the settings."""
        return f"{super().extra_repr()}, target={self.target}"
