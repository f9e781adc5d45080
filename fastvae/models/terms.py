"""The terms of a loss as they were computed, so that one that is not finite can be named."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor, nn

from fastvae._compiling import is_compiling
from fastvae.models.steps import TrainingStep

__all__ = ["describe", "note_penalty", "note_step", "recorded_terms"]

# Of this thread: a model that several threads evaluate is not where a note belongs.
_recorded: ContextVar[dict[str, Tensor] | None] = ContextVar("terms of the loss", default=None)


@contextmanager
def recorded_terms() -> Iterator[dict[str, Tensor]]:
    """Collect the terms of the loss that a model computes inside the block, detached, [B, ...] each, by name.

    Nothing comes of a model that is compiled or not one of fastvae's.
    """
    terms: dict[str, Tensor] = {}
    token = _recorded.set(terms)
    try:
        yield terms
    finally:
        _recorded.reset(token)


def note_step(step: TrainingStep) -> None:
    """What the loss is made of, in the order in which one thing follows from the other."""
    if is_compiling() or (terms := _recorded.get()) is None:
        return
    terms["the mean of q(z | x)"] = step.mu.detach()
    terms["the log variance of q(z | x)"] = step.logvar.detach()
    terms["the reconstruction term -log p(x | z)"] = step.log_px.detach()
    if step.kl is not None:
        terms["the KL term"] = step.kl.detach()
    terms["the loss without penalties"] = step.loss.detach()


def note_penalty(penalty: nn.Module, term: Tensor) -> None:
    """What a penalty adds to the loss."""
    if not is_compiling() and (terms := _recorded.get()) is not None:
        terms[f"the penalty {type(penalty).__name__}"] = term.detach()


def describe(terms: dict[str, Tensor]) -> str:
    """Which of the terms are not finite, and in how many samples; empty if all are."""
    found: list[str] = []
    for name, term in terms.items():
        bad = int((~torch.isfinite(term)).reshape(term.shape[0], -1).any(1).sum())
        if bad and not (name == "the loss without penalties" and found):
            found.append(f"{name} (in {bad} of {term.shape[0]} samples)")
    return "not finite: " + ", ".join(found) if found else ""
