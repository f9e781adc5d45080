"""Bounds and likelihoods of test and training data."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from fastvae.metrics import Estimate
from fastvae.ood import NegativeLogLikelihood
from fastvae.report.page import Section, Table
from fastvae.report.subject import Subject
from fastvae.report.wording import estimated, mean_with_error

__all__ = ["evidence", "importance_samples"]

_BOUNDS = 20
"""One-sample estimates of the bound for each image."""


def importance_samples(subject: Subject, images: int) -> int:
    """How many weights an image gets."""
    return subject.afford(1000, images * subject.flops_of_weight, least=20)


def evidence(subject: Subject) -> Section:
    """The evidence lower bound and log p(x), of samples that took part in training and of those that did not."""
    count = subject.afford(len(subject.test), 100 * subject.flops_of_weight, least=min(50, len(subject.test)))
    samples = importance_samples(subject, 2 * count)
    score = NegativeLogLikelihood(subject.model, num_samples=samples, seed=subject.seed)
    noun, element = subject.noun, subject.element
    sets = {"test": subject.test[:count], "training": subject.train[:count]}
    conditions = {"test": subject.test_condition, "training": subject.train_condition}
    besides = {name: subject.given(condition, count) for name, condition in conditions.items()}
    likelihoods = {name: -score(x, **besides[name]).cpu() for name, x in sets.items()}
    bounds = {name: _bound(subject, x, besides[name]) for name, x in sets.items()}
    baseline = (
        {name: _independent_pixels(subject.train, x) for name, x in sets.items()} if subject.is_binary else {}
    )
    rows = [
        [name, *(estimated(mean_with_error(values[of])) for of in sets)]
        for name, values in (
            ("bound (ELBO)", bounds),
            ("log p(x)", likelihoods),
            (f"{element}s independent", baseline),
        )
        if values
    ]
    value = mean_with_error(likelihoods["test"])
    verdict = f"log p(x) of a test {noun} is {estimated(value)} nats"
    worked = None
    if baseline:
        gain = float((likelihoods["test"] - baseline["test"]).mean())
        worked = gain > 0
        verdict += f", {abs(gain):,.1f} {'above' if gain > 0 else 'below'} a model of independent {element}s"
    verdict += f"; {_overfitting(likelihoods, noun)}."
    size = subject.test[0].numel()
    units = (
        ", of columns less their means and over their standard deviations" if subject.is_standardised else ""
    )
    return Section(
        "Bound and likelihood",
        verdict,
        worked,
        [
            f"""In nats per {noun} of {size} values{units}: means over {len(sets["test"])} test and
            {len(sets["training"])} training {noun}s ± their standard errors, which are those of the choice of {noun}s
            and not of another training run. Bound: {_BOUNDS} one-sample estimates for each {noun}. log p(x): importance
            sampling with {samples} samples for each {noun}, low in expectation. The two differ by what the encoder's
            posterior is off: {float((likelihoods["test"] - bounds["test"]).mean()):.2f} nats."""
        ],
        Table(["", "test", "training"], rows),
    )


@torch.no_grad()
def _bound(subject: Subject, x: Tensor, given: dict[str, Any]) -> Tensor:
    generator, x = subject.generator(), subject.here(x)
    return torch.stack(
        [subject.model.elbo(x, generator=generator, **given).cpu() for _ in range(_BOUNDS)]
    ).mean(0)


def _independent_pixels(train: Tensor, x: Tensor) -> Tensor:
    """log p of [N] binary images where each pixel is on as often as in the training images, or a little more."""
    share = (train.sum(0) + 0.5) / (len(train) + 1)
    return (x * share.log() + (1 - x) * (1 - share).log()).flatten(1).sum(1)


def _overfitting(likelihoods: dict[str, Tensor], noun: str) -> str:
    test, train = (mean_with_error(likelihoods[of]) for of in ("test", "training"))
    gap = Estimate(train.mean - test.mean, math.hypot(train.standard_error, test.standard_error))
    if gap.mean > 2 * gap.standard_error:
        return f"training {noun}s are likelier by {estimated(gap)}, so it has learnt some of them by heart"
    return (
        f"training {noun}s are not likelier beyond error ({estimated(gap)}), so nothing says that it overfits"
    )
