"""The objective at a batch and at the views of it that penalties ask for, evaluated as one batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from fastvae.models.observation import Observation
from fastvae.models.steps import Penalty, TrainingStep
from fastvae.models.terms import note_step

if TYPE_CHECKING:
    from fastvae.models.base import BaseVAE

__all__ = ["steps_for"]


def steps_for(
    penalties: nn.ModuleList,
    model: BaseVAE,
    observation: Observation,
    noise: Tensor | None,
    generator: torch.Generator | None,
) -> tuple[TrainingStep, list[TrainingStep]]:
    """The step of x alone, and what each penalty is handed: that, with the step of its own view of x."""
    views = [p.view(observation.x, generator) if isinstance(p, Penalty) else None for p in penalties]
    asked = [
        (view, getattr(penalty, "common_noise", False))
        for penalty, view in zip(penalties, views, strict=True)
        if view is not None
    ]
    step, *steps = _evaluated(model, observation, asked, noise, generator)
    note_step(step)
    # Each of the view as it was: a penalty that reads its loss must not find another penalty's in it.
    on_views = [penalty for penalty in penalties if isinstance(penalty, Penalty) and penalty.on_views]
    if on_views:
        steps = [
            replace(view, loss=torch.stack([view.loss, *(penalty(view) for penalty in on_views)]).sum(0))
            for view in steps
        ]
    rest = iter(steps)
    return step, [step if view is None else replace(step, view=next(rest)) for view in views]


def _evaluated(
    model: BaseVAE,
    observation: Observation,
    asked: Sequence[tuple[Tensor, bool]],
    noise: Tensor | None,
    generator: torch.Generator | None,
) -> list[TrainingStep]:
    """The objective at x and at each view that was asked for, as one batch.

    The views of a sample stand side by side, which is how TracIn tells samples apart. With each view comes whether
    it shares the noise of x.
    """
    x = observation.x
    if not asked:
        return [model.objective(x, noise=noise, generator=generator, **observation.given)]
    if observation.weight is not None:
        raise ValueError(
            f"{type(model).__name__}: weight: expected none where a penalty asks for views of x, since the weights of "
            "a view's elements are not known"
        )
    batch = [x, *(view for view, _ in asked)]
    samples, count = x.shape[0], len(batch)
    # Which draw each view takes: x the first, the others one of their own each, or that of x.
    draws = [0]
    for _, shares in asked:
        draws.append(0 if noise is not None or shares else max(draws) + 1)

    def of_views(mu: Tensor) -> Tensor:
        own = max(draws) + 1
        drawn = model._noise(mu[: samples * own], noise, generator)
        each = drawn.reshape(len(drawn), samples, own, mu.shape[1]).unbind(2)
        # Not by a list of indices, which would be copied to a GPU.
        return torch.stack([each[draw] for draw in draws], 2).flatten(1, 2)

    together = torch.stack(batch, 1).reshape(samples * count, *x.shape[1:])
    besides = observation.interleaved(count).given
    return model.objective(together, noise=of_views, generator=generator, **besides).parts(batch)
