"""The comparison that comes before any score: gradients from factors against autograd's, sample by sample.

Finds what no look at the modules can: a parameter used outside its module's forward, samples that depend on each
other, a batch whose samples do not stand side by side.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from fastvae.influence.coverage import UncoveredParameter
from fastvae.influence.evaluation import Batch, Evaluation
from fastvae.influence.factors import TILES, Factors
from fastvae.influence.layers import Layer
from fastvae.influence.rules import Terms
from fastvae.influence.snapshots import Snapshot
from fastvae.influence.sweeps import Call
from fastvae.lowering.verification import TOLERANCE_ON_A_GPU
from fastvae.private import private_copy

if TYPE_CHECKING:
    from fastvae.influence.engine import Engine

__all__ = ["AUDITED", "audit"]

AUDITED = 8
"""Samples that are compared; fewer, but two, where their gradients would have more entries together than this:"""
_NUMBERS = 2**23


def audit(engine: Engine, evaluation: Evaluation, batch: Batch) -> dict[str, Terms | None]:
    """The terms of each layer; parameters whose gradients differ are moved to the next way that there is.

    In float64 if the model runs in it, where round-off hides nothing.
    """
    numel = sum(parameter.numel() for parameter in engine.parameters.values())
    few = tuple(part[: max(2, min(AUDITED, _NUMBERS // numel))] for part in batch)
    own = evaluation.snapshot
    _check_takes_part(engine, evaluation, few)
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


def _check_takes_part(engine: Engine, evaluation: Evaluation, few: Batch) -> None:
    """ValueError for a loss of other weights than those of the model, of which a copy is scored."""
    parameters = list(evaluation.snapshot.model.parameters())
    if len(engine.parameters) < len(parameters):
        return  # Of a part of them these samples may well need none.
    with torch.enable_grad():
        loss = evaluation.losses(few).sum()
    if loss.requires_grad and any(
        gradient is not None for gradient in torch.autograd.grad(loss, parameters, allow_unused=True)
    ):
        return
    raise ValueError(
        "TracIn: model: expected a loss that depends on the model's parameters, got one that depends on none of them: "
        "scores work on a copy of the model, whose forward or loss_fn must not reach for a module that it does not "
        "hold, such as a global"
    )


def _bind(engine: Engine, evaluation: Evaluation, snapshot: Snapshot) -> None:
    engine.bind(snapshot.model)
    evaluation.bind(snapshot)


def _compared(engine: Engine, evaluation: Evaluation, few: Batch) -> dict[str, Terms | None]:
    names = engine.covered
    numels = [engine.parameters[name].numel() for name in names]
    gradients = engine.by_autograd(evaluation, few, names, True).split(numels, 1) if names else ()
    exact = dict(zip(names, gradients, strict=True))
    largest = max((float(gradient.norm()) for gradient in gradients), default=0.0)
    while True:
        terms, errors = _errors(engine, evaluation, few, exact, largest)
        if not errors:
            return terms
        for name, error in errors.items():
            if math.isinf(error):
                engine.move(name, "the samples in what its layer is given cannot be told apart")
                continue
            engine.move(
                name,
                f"its gradient from its layer's inputs and output gradients is off by {error:.1e} of autograd's: it is "
                "used outside its layer's forward, or samples of a batch depend on each other",
            )


def _errors(
    engine: Engine, evaluation: Evaluation, few: Batch, exact: dict[str, Tensor], largest: float
) -> tuple[dict[str, Terms | None], dict[str, float]]:
    """The terms of each layer, and the relative errors of the parameters whose gradients differ."""
    samples, draws = len(few[0]), evaluation.draws_of(few)
    terms: dict[str, Terms | None] = {}
    errors: dict[str, float] = {}
    unknown = set(engine.covered)
    eps, tolerance = _precision(evaluation.snapshot.model)

    def compare(name: str, gradient: Tensor, magnitude: Tensor | None = None) -> None:
        unknown.discard(name)
        errors.pop(name, None)
        wanted = exact[name]
        size = float(wanted.norm())
        error = float((gradient - wanted).norm())
        # Sums in another order differ by the round-off of their terms, which may cancel to a true gradient of zero
        # (a bias before InstanceNorm); what is missing is of the size of the gradient.
        cancelled = 0.0 if magnitude is None else float(magnitude.norm())
        if not error <= tolerance * size + 100 * eps * cancelled + 30 * eps * largest:
            errors[name] = error / max(size, torch.finfo(wanted.dtype).tiny)

    captured = engine.capture(evaluation, few, True, 1 / draws)
    for name in engine.of_sweep:
        if name in captured.of_sweep:
            compare(name, captured.of_sweep[name])
        else:
            errors[name] = math.inf
            unknown.discard(name)
    for layer, calls in captured.layers:
        terms[layer.name] = None
        try:
            terms[layer.name] = layer.terms(calls, samples)
            parts = _of_layer(engine, layer, calls, samples)
        # Rows that are not as many for each sample, say.
        except RuntimeError:
            errors |= dict.fromkeys((*layer.weight, *layer.bias), math.inf)
            unknown.difference_update((*layer.weight, *layer.bias))
            continue
        for name, gradient, magnitude in parts:
            compare(name, gradient, magnitude)
    if captured.modules:
        # The same samples without the last one, to see where they are; a single sample is also two.
        fewer = (
            tuple(part[:-1] for part in few)
            if samples > 1
            else tuple(part.repeat_interleave(2, 0) for part in few)
        )
        again = {
            id(whole): calls for whole, calls in engine.capture(evaluation, fewer, True, 1 / draws).modules
        }
        for whole, module_calls in captured.modules:
            sizes = [engine.parameters[name].numel() for name in whole.names]
            try:
                whole.learn(module_calls, samples, again.get(id(whole), []), len(fewer[0]))
                gradients = whole.gradients(module_calls, samples).split(sizes, 1)
            # Whatever a module raises that torch.vmap cannot run, or whose samples do not stand apart.
            except Exception:
                errors |= dict.fromkeys(whole.names, math.inf)
                unknown.difference_update(whole.names)
                continue
            for name, gradient in zip(whole.names, gradients, strict=True):
                compare(name, gradient)
    for name in list(unknown):
        compare(name, torch.zeros_like(exact[name]))
    return terms, errors


def _precision(model: nn.Module) -> tuple[float, float]:
    """Round-off of the coarsest type of a model's parameters, which any value may go through, and what it sums to."""
    parameters = [
        parameter
        for parameter in model.parameters()
        if parameter.dtype.is_floating_point or parameter.is_complex()
    ]
    coarsest = max((parameter.dtype for parameter in parameters), key=lambda dtype: torch.finfo(dtype).eps)
    eps = torch.finfo(coarsest).eps
    # PyTorch's operators for a GPU are not all as exact as their type: weight_norm takes a float64's root in float32.
    least = TOLERANCE_ON_A_GPU.get(coarsest, 0.0) if any(p.is_cuda for p in parameters) else 0.0
    return eps, max(math.sqrt(eps), least)


def _of_layer(
    engine: Engine, layer: Layer, calls: list[Call], samples: int
) -> list[tuple[str, Tensor, Tensor]]:
    """Names, gradients [B, numel] and magnitudes of a layer's parameters."""
    kinds = [(kind, names) for kind in ("weight", "bias") if (names := getattr(layer, kind))]
    factors = Factors()
    engine.add_factors(factors, layer, calls, TILES, samples)
    found = []
    for (kind, names), part in zip(kinds, factors.dense, strict=True):
        of_calls = [
            layer.rule.magnitude(kind, layer.module, call.input, call.grad, samples) for call in calls
        ]
        magnitude = torch.stack(of_calls).sum(0)
        sizes = [engine.parameters[name].numel() for name in names]
        ordered = layer.in_order(kind, part).split(sizes, 1)
        found += [(name, gradient, magnitude) for name, gradient in zip(names, ordered, strict=True)]
    return found
