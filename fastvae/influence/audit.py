"""The comparison that comes before any score: gradients from factors against autograd's, sample by sample.

Finds what no look at the modules can: a parameter used outside its module's forward, samples that depend on each
other, a batch whose samples do not stand side by side.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastvae.influence.coverage import UncoveredParameter
from fastvae.influence.evaluation import Batch, Evaluation
from fastvae.influence.factors import TILES, Factors
from fastvae.influence.rules import Terms
from fastvae.influence.snapshots import Snapshot
from fastvae.private import private_copy

if TYPE_CHECKING:
    from fastvae.influence.engine import Engine

__all__ = ["AUDITED", "audit"]

AUDITED = 8
"""Samples that are compared; fewer, but two, where their gradients would have more entries together than this:"""
_NUMBERS = 2**23


def audit(
    engine: Engine, evaluation: Evaluation, batch: Batch
) -> tuple[dict[str, Terms | None], dict[str, str]]:
    """The terms of each layer, and the parameters whose gradients differ, with the reason.

    In float64 if the model runs in it, where round-off hides nothing.
    """
    numel = sum(parameter.numel() for parameter in engine.parameters.values())
    few = tuple(part[: max(2, min(AUDITED, _NUMBERS // numel))] for part in batch)
    own = evaluation.snapshot
    try:
        _bind(engine, evaluation, Snapshot(1.0, private_copy(own.model).double()))
        return _compared(engine, evaluation, tuple(x.double() if x.is_floating_point() else x for x in few))
    except UncoveredParameter:
        raise
    except Exception:
        # A dtype is written down in the model or in the loss; if it is something else, it is raised here.
        _bind(engine, evaluation, own)
        return _compared(engine, evaluation, few)
    finally:
        _bind(engine, evaluation, own)


def _bind(engine: Engine, evaluation: Evaluation, snapshot: Snapshot) -> None:
    engine.bind(snapshot.model)
    evaluation.bind(snapshot)


def _compared(
    engine: Engine, evaluation: Evaluation, few: Batch
) -> tuple[dict[str, Terms | None], dict[str, str]]:
    samples, draws = len(few[0]), evaluation.draws_of(few)
    found: dict[str, Tensor] = {}
    magnitudes: dict[str, Tensor] = {}
    terms: dict[str, Terms | None] = {}
    captured, own = engine.capture(evaluation, few, True, 1 / draws)
    if own is not None:
        sizes = [engine.parameters[name].numel() for name in engine.of_flow]
        found |= dict(zip(engine.of_flow, own.split(sizes, 1), strict=True))
    for layer, calls in captured:
        terms[layer.name] = layer.terms(calls, samples)
        kinds = [kind for kind, has in (("weight", layer.weight), ("bias", layer.bias)) if has]
        factors = Factors()
        engine.add_factors(factors, layer, calls, TILES, samples)
        for kind, part in zip(kinds, factors.dense, strict=True):
            ordered = layer.rule.as_parameter(layer.module, part) if kind == "weight" else part
            name = f"{layer.name}.{kind}".lstrip(".")
            found[name] = ordered
            sizes_of_calls = [
                layer.rule.magnitude(kind, layer.module, call.input, call.grad, samples) for call in calls
            ]
            magnitudes[name] = torch.stack(sizes_of_calls).sum(0)
    names = engine.covered
    numels = [engine.parameters[name].numel() for name in names]
    exact = engine.by_autograd(evaluation, few, names, True).split(numels, 1) if names else ()
    largest = max((float(gradient.norm()) for gradient in exact), default=0.0)
    reasons = {}
    for name, gradient in zip(names, exact, strict=True):
        eps, size = torch.finfo(gradient.dtype).eps, float(gradient.norm())
        error = float((found.get(name, torch.zeros_like(gradient)) - gradient).norm())
        # Sums in another order differ by the round-off of their terms, which may cancel to a true gradient of zero
        # (a bias before InstanceNorm); what is missing is of the size of the gradient.
        cancelled = float(magnitudes[name].norm()) if name in magnitudes else 0.0
        if not error <= math.sqrt(eps) * size + 100 * eps * cancelled + 10 * eps * largest:
            reasons[name] = (
                "its gradient from its layer's inputs and output gradients is off by "
                f"{error / max(size, torch.finfo(gradient.dtype).tiny):.1e} of autograd's: it is used outside its "
                "layer's forward, or samples of a batch depend on each other"
            )
    return terms, reasons
