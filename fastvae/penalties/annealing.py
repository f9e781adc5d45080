"""Weights that grow linearly from 0 over the first optimisation steps."""

from __future__ import annotations

import torch
from torch import Tensor

from fastvae.arguments import expect, expect_integers, expect_numbers, is_integer
from fastvae.models.base import Penalty, TrainingStep

__all__ = ["AnnealedPenalty", "BetaAnnealing"]


class AnnealedPenalty(Penalty):
    """A penalty that knows how many optimisation steps were taken; the count is saved and moved with it.

    Args:
        anneal_steps: after so many steps the ramp, which begins at 0, has reached 1. 0: it is 1 throughout.

    Raises:
        ValueError: anneal_steps below 0 or no integer.
    """

    steps_taken: Tensor
    """int64 []"""

    def __init__(self, anneal_steps: int = 0) -> None:
        super().__init__()
        expect_integers(type(self).__name__, 0, anneal_steps=anneal_steps)
        self.anneal_steps = int(anneal_steps)
        self.register_buffer("steps_taken", torch.zeros((), dtype=torch.int64))

    def ramp(self) -> Tensor:
        """min(1, steps taken / anneal_steps): [] float64, on the module's device."""
        if not self.anneal_steps:
            return torch.ones_like(self.steps_taken, dtype=torch.float64)
        return (self.steps_taken.double() / self.anneal_steps).clamp(max=1)

    def step(self) -> None:
        """One optimisation step was taken; ``fit`` calls it."""
        self.steps_taken += 1

    def extra_repr(self) -> str:
        """What ``repr`` says of the settings."""
        return f"anneal_steps={self.anneal_steps}"


class BetaAnnealing(AnnealedPenalty):
    """Lets the model's beta grow linearly from 0 to its value over ``anneal_steps`` optimisation steps, once or often.

    For models whose loss is beta R - log p(x | z), as VAE and HVAE: it adds (ramp - 1) beta R, also for the views that
    a ``Consistency`` asks for. ``elbo`` and ``log_likelihood``, which have beta = 1, are not touched.

    Args:
        anneal_steps: of a ramp.
        cycle_steps: steps after which beta falls to 0 and the ramp begins again (Fu et al., "Cyclical annealing
            schedule", NAACL 2019); None: never.
        num_cycles: after so many cycles beta stays where it is.

    Raises:
        ValueError: a cycle that is shorter than its ramp, or num_cycles without cycle_steps; in training, a model whose
            loss is not linear in beta (IWAE).
    """

    on_views = True

    def __init__(
        self, anneal_steps: int = 0, *, cycle_steps: int | None = None, num_cycles: int | None = None
    ) -> None:
        super().__init__(anneal_steps)
        expect_numbers("BetaAnnealing", cycle_steps=cycle_steps, num_cycles=num_cycles)
        expect(
            cycle_steps is None or (is_integer(cycle_steps) and cycle_steps >= max(1, self.anneal_steps)),
            f"BetaAnnealing: cycle_steps: expected an int of at least anneal_steps = {self.anneal_steps}",
            repr(cycle_steps),
        )
        expect(
            num_cycles is None or (is_integer(num_cycles) and num_cycles >= 1 and cycle_steps is not None),
            "BetaAnnealing: num_cycles: expected an int of at least 1, with cycle_steps",
            repr(num_cycles),
        )
        self.cycle_steps, self.num_cycles = cycle_steps, num_cycles

    def ramp(self) -> Tensor:
        """Of the present cycle: [] float64, on the module's device."""
        if self.cycle_steps is None or not self.anneal_steps:
            return super().ramp()
        within = (self.steps_taken % self.cycle_steps).double() / self.anneal_steps
        if self.num_cycles is not None:
            over = self.steps_taken >= self.num_cycles * self.cycle_steps
            within = within.masked_fill(over, 1)
        return within.clamp(max=1)

    def extra_repr(self) -> str:
        """What ``repr`` says of the settings."""
        cycles = (
            ""
            if self.cycle_steps is None
            else f", cycle_steps={self.cycle_steps}, num_cycles={self.num_cycles}"
        )
        return super().extra_repr() + cycles

    def forward(self, step: TrainingStep) -> Tensor:
        """(ramp - 1) beta R of each sample, which the loss has at full weight: [B]."""
        if not step.model.linear_in_beta:
            raise ValueError(
                "BetaAnnealing: expected a model whose loss is linear in beta (VAE, HVAE), "
                f"got {type(step.model).__name__}"
            )
        return (self.ramp() - 1) * (step.loss + step.log_px)
