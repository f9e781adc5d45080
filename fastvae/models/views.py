"""The objective at a batch and at the views of it that penalties ask for, evaluated as one batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from fastvae.likelihoods.weights import expanded, filled
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
    views = [_view(p, observation, generator) if isinstance(p, Penalty) else None for p in penalties]
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


def _view(
    penalty: Penalty, observation: Observation, generator: torch.Generator | None
) -> Observation | None:
    """The view of x that a penalty asks for, with the condition of x and weights of its own."""
    x, _, weight = observation
    if weight is None:
        found = penalty.view(x, generator)
        return None if found is None else observation._replace(x=found)
    weight = expanded(type(penalty).__name__, weight, x)
    pair = penalty.weighted_view(filled(x, weight), weight, generator)
    return None if pair is None else observation._replace(x=pair[0], weight=pair[1])


def _evaluated(
    model: BaseVAE,
    observation: Observation,
    asked: Sequence[tuple[Observation, bool]],
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
    batch = [observation.each(lambda tensor: tensor), *(view for view, _ in asked)]
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

    def together(tensors: Sequence[Tensor | None]) -> Tensor | None:
        """Of all views, those of a sample side by side."""
        there = [tensor for tensor in tensors if tensor is not None]
        return torch.stack(there, 1).reshape(samples * count, *there[0].shape[1:]) if there else None

    of_all = Observation(*(together(tensors) for tensors in zip(*batch, strict=True)))  # type: ignore[arg-type]
    step = model.objective(of_all.x, noise=of_views, generator=generator, **of_all.given)
    return step.parts([each.x for each in batch])
