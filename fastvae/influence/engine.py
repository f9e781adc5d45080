"""The factors of a batch's gradients, from one forward and backward pass with hooks on the layers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.nn import functional as F

from fastvae.influence.audit import audit
from fastvae.influence.coverage import Coverage, CoverageRow, UncoveredParameter
from fastvae.influence.evaluation import Batch, Evaluation
from fastvae.influence.factors import GRAM, TILES, Factors, cheaper_route, pair_cost, self_route
from fastvae.influence.rules import NormRule, Rule, Terms, rule_of
from fastvae.influence.sweeps import Call, flow_parameters, is_swept

__all__ = ["Engine"]


@dataclass
class _Layer:
    """A module with parameters that take part."""

    name: str
    module: nn.Module
    rule: Rule
    weight: bool
    bias: bool

    def terms(self, calls: list[Call], samples: int) -> Terms | None:
        """Of all calls of a batch together; None where the weight takes no part or has no factors."""
        if not self.weight:
            return None
        found = [self.rule.terms(self.module, call.input, call.grad, samples) for call in calls]
        known = [terms for terms in found if terms is not None]
        if len(known) < len(found):
            return None
        return Terms(sum(terms.count for terms in known), known[0].inputs, known[0].outputs)


@dataclass
class _Seen:
    """What a hook saw of one call of a layer."""

    input: Tensor
    version: int
    edge: GradientEdge


class Engine:
    """Per-sample gradients of a model's loss over its trained parameters, in factored form.

    Args:
        model: any module, a private copy in eval mode; ``bind`` exchanges it for that of another checkpoint.
        layers: names of the modules whose parameters take part; None: all.
        uncovered: "error", or "materialise": the gradients of parameters that no rule covers are computed by
            autograd, sample by sample.

    Raises:
        UncoveredParameter: by "error".
        ValueError: a name in ``layers`` that the model does not have, or nothing to differentiate.
    """

    def __init__(self, model: nn.Module, layers: Sequence[str] | None, uncovered: str) -> None:
        if uncovered not in ("error", "materialise"):
            raise ValueError(f"TracIn: uncovered: expected 'error' or 'materialise', got {uncovered!r}")
        self.model, self._materialise = model, uncovered == "materialise"
        chosen = _parameters_under(model, layers)
        self._absent: dict[str, tuple[nn.Parameter, str]] = {}
        wanted: dict[str, nn.Parameter] = {}
        for name, parameter in model.named_parameters():
            if id(parameter) not in chosen:
                self._absent[name] = (parameter, "left out by layers=")
            elif not parameter.requires_grad:
                self._absent[name] = (parameter, "frozen: not trained")
            else:
                wanted[name] = parameter
        if not wanted:
            raise ValueError("TracIn: the model has no trained parameter among the chosen layers")
        self.parameters = wanted
        self._layers, self._uncovered = _layers_of(model, wanted)
        # The flow of an HVAE hands out the gradients of its own parameters, if its decoder can be swept.
        self.of_flow = [name for name in flow_parameters(model) if name in wanted] if is_swept(model) else []
        for name in self.of_flow:
            self._uncovered.pop(name, None)
        for penalty in getattr(model, "penalties", ()):
            if getattr(penalty, "differentiates_decoder", False):
                reason = (
                    f"{type(penalty).__name__} differentiates the decoder, and its gradient is no layer's own"
                )
                self._uncovered |= {name: reason for name in wanted if _in_decoder(name)}
                self._leave_out_uncovered()
        for name, reason in self._uncovered.items():
            self._refuse(name, reason)
        self._terms: dict[str, Terms | None] = {}
        self._audited: set[Any] = set()

    def bind(self, model: nn.Module) -> None:
        """Work on another copy of the model, of which the same parameters are differentiated."""
        parameters, modules = dict(model.named_parameters()), dict(model.named_modules())
        known = [*self.parameters, *(layer.name for layer in self._layers)]
        missing = [name for name in known if name not in parameters and name not in modules]
        if missing:
            raise ValueError(
                f"TracIn: model: expected the layers that it had when TracIn was made, got none at {missing[0]!r}"
            )
        self.model = model
        # Frozen since or not: what was trained when TracIn was made takes part.
        self.parameters = {name: parameters[name] for name in self.parameters}
        for parameter in self.parameters.values():
            parameter.requires_grad_()
        for layer in self._layers:
            layer.module = modules[layer.name]

    def _refuse(self, name: str, reason: str) -> None:
        if not self._materialise:
            raise UncoveredParameter(name, reason)

    def _leave_out_uncovered(self) -> None:
        for layer in self._layers:
            layer.weight = layer.weight and f"{layer.name}.weight".lstrip(".") not in self._uncovered
            layer.bias = layer.bias and f"{layer.name}.bias".lstrip(".") not in self._uncovered
        self._layers = [layer for layer in self._layers if layer.weight or layer.bias]

    # ---- factors ----

    def routes(self, rows: int, columns: int | None) -> dict[str, str]:
        """The route of every layer for ``rows`` samples with ``columns`` others (None: with themselves).

        Known once ``audit`` has seen samples.
        """
        found = {}
        for name, terms in self._terms.items():
            if terms is None:
                found[name] = TILES
            elif columns is None:
                found[name] = self_route(terms)
            else:
                found[name] = cheaper_route(terms, terms.count, rows, columns)
        return found

    def factor_numel(self, routes: dict[str, str]) -> int:
        """Numbers that the factors of one sample take, about."""
        numel = self.gradient_numel(routes)
        for layer in self._layers:
            terms = self._terms[layer.name]
            if terms is not None and routes[layer.name] == GRAM:
                numel += terms.count * (terms.inputs + terms.outputs)
        return numel

    def gradient_numel(self, routes: dict[str, str]) -> int:
        """Those of them that are entries of gradients."""
        numel = sum(self.parameters[name].numel() for name in self._uncovered)
        for layer in self._layers:
            if self._terms[layer.name] is None or routes[layer.name] == TILES:
                numel += sum(parameter.numel() for parameter in layer.module.parameters(recurse=False))
        return numel

    def factors(
        self, evaluation: Evaluation, batch: Batch, routes: dict[str, str], *, fold: bool = True
    ) -> Factors:
        """The gradients of the mean loss over the draws, of each sample.

        Without ``fold``, of each draw of each sample: B * S rows, and none is divided by S.
        """
        draws = evaluation.draws_of(batch)
        samples = len(batch[0]) * (1 if fold else draws)
        found = Factors()
        captured, own = self.capture(evaluation, batch, fold, 1 / draws if fold else 1.0)
        found.dense += [] if own is None else [own]
        for layer, calls in captured:
            self.add_factors(found, layer, calls, routes[layer.name], samples)
        if self._uncovered:
            found.dense.append(self.by_autograd(evaluation, batch, list(self._uncovered), fold))
        return found

    def add_factors(self, found: Factors, layer: _Layer, calls: list[Call], route: str, samples: int) -> None:
        """Append what the calls of a layer make of its gradients, by this route."""
        rule, module = layer.rule, layer.module
        if layer.weight and route == GRAM:
            pairs = [rule.factors(module, call.input, call.grad, samples) for call in calls]
            bias = layer.bias and rule.bias_in_terms
            if bias and any(call.tangent for call in calls):
                # Not every term is one of the bias: a feature that is 1 or 0 says which.
                pairs = [
                    (F.pad(h, (0, 1), value=0.0 if call.tangent else 1.0), delta)
                    for call, (h, delta) in zip(calls, pairs, strict=True)
                ]
                bias = False
            # Calls of one layer share its weight: their terms stand side by side.
            h, delta = (
                torch.cat(terms, 1) if len(terms) > 1 else terms[0] for terms in zip(*pairs, strict=True)
            )
            found.inputs.append(h)
            found.output_grads.append(delta)
            found.bias.append(bias)
        elif layer.weight:
            found.dense.append(_sum(_weight_gradient(layer, call, samples) for call in calls))
        if layer.bias and not (layer.weight and route == GRAM and rule.bias_in_terms):
            of_bias = [call for call in calls if not call.tangent]
            found.dense.append(
                _sum(rule.bias_gradient(module, call.input, call.grad, samples) for call in of_bias)
            )

    def capture(
        self, evaluation: Evaluation, batch: Batch, fold: bool, scale: float
    ) -> tuple[list[tuple[_Layer, list[Call]]], Tensor | None]:
        """Every layer with what it was given and the gradient at what it gave; the flow's own gradients [B, P]."""
        if (known := evaluation.calls(batch, fold)) is not None:
            return [(layer, known[layer.name]) for layer in self._layers if layer.name in known], None
        sweep = evaluation.sweep()
        samples = len(batch[0]) * (1 if fold else evaluation.draws_of(batch))
        hooked = [layer for layer in self._layers if sweep is None or not _in_decoder(layer.name)]
        seen: dict[str, list[_Seen]] = {layer.name: [] for layer in hooked}
        with torch.enable_grad(), _hooks(hooked, seen):
            total = evaluation.losses(batch, fold, sweep).sum()
        flat = [call for of_layer in seen.values() for call in of_layer]
        for name, of_layer in seen.items():
            if any(call.input._version != call.version for call in of_layer):
                raise ValueError(f"TracIn: {name}: its input was changed in place after the layer read it")
        edges = [call.edge for call in flat] + ([] if sweep is None else sweep.edges)
        grads = (
            torch.autograd.grad(total, edges, total.new_full((), scale), allow_unused=True) if edges else ()
        )
        found: dict[str, list[Call]] = {}
        names = [name for name, of_layer in seen.items() for _ in of_layer]
        for name, call, grad in zip(names, flat, grads, strict=False):
            if grad is not None:
                found.setdefault(name, []).append(Call(call.input, grad))
        own = None
        if sweep is not None:
            found |= {layer.name: sweep.calls(layer.name) for layer in self._layers if layer not in hooked}
            if self.of_flow:
                gradients = sweep.gradients(self.of_flow, samples)
                own = torch.cat([gradients[name] for name in self.of_flow], 1)
        # A layer that the losses do not depend on has gradients of zero.
        return [(layer, found[layer.name]) for layer in self._layers if found.get(layer.name)], own

    def by_autograd(self, evaluation: Evaluation, batch: Batch, names: Sequence[str], fold: bool) -> Tensor:
        """[B, P] (or [B * S, P]) the gradients of these parameters, one sample at a time."""
        parameters = [self.parameters[name] for name in names]
        rows = []
        for i in range(len(batch[0])):
            with torch.enable_grad():
                losses = evaluation.losses(tuple(part[i : i + 1] for part in batch), fold)
                terms = (losses.mean(),) if fold else losses.unbind()
            for loss in terms:
                grads = torch.autograd.grad(
                    loss, parameters, allow_unused=True, retain_graph=not fold, materialize_grads=True
                )
                rows.append(torch.cat([grad.flatten() for grad in grads]))
        return torch.stack(rows)

    # ---- what is covered ----

    @property
    def covered(self) -> list[str]:
        """The parameters whose gradients come from factors."""
        return [name for name in self.parameters if name not in self._uncovered]

    def audited(self, evaluation: Evaluation) -> bool:
        """Whether ``audit`` has compared the gradients of this loss."""
        return evaluation.loss_fn in self._audited

    def audit(self, evaluation: Evaluation, batch: Batch) -> None:
        """Compare the gradients of a few samples with autograd's, once for a loss; see ``audit.audit``."""
        if self.audited(evaluation):
            return
        terms, reasons = audit(self, evaluation, batch)
        for name, reason in reasons.items():
            self._refuse(name, reason)
            self._uncovered[name] = reason
        self._leave_out_uncovered()
        self._terms = {layer.name: terms.get(layer.name) for layer in self._layers}
        self._audited.add(evaluation.loss_fn)

    def coverage(self, rows: int, columns: int) -> Coverage:
        """The rule and route of every parameter, for ``rows`` samples with ``columns`` others."""
        routes = self.routes(rows, columns)
        owners = {
            f"{layer.name}.{kind}".lstrip("."): layer for layer in self._layers for kind in ("weight", "bias")
        }
        found = []
        for name, parameter in self.model.named_parameters():
            shape, numel = tuple(parameter.shape), parameter.numel()
            if name in self._absent:
                found.append(CoverageRow(name, shape, self._absent[name][1], "", 0.0))
            elif name in self.of_flow and name not in self._uncovered:
                found.append(CoverageRow(name, shape, "Hamiltonian flow", TILES, numel))
            elif name in self._uncovered:
                rule = f"autograd, sample by sample: {self._uncovered[name]}"
                found.append(CoverageRow(name, shape, rule, TILES, numel))
            else:
                layer = owners[name]
                terms, route = self._terms[layer.name], routes[layer.name]
                kind = type(layer.module).__name__
                if name.endswith("bias") and route == GRAM and layer.rule.bias_in_terms and layer.weight:
                    found.append(CoverageRow(name, shape, kind, "gram", 0.0))
                elif name.endswith("bias") or terms is None:
                    found.append(CoverageRow(name, shape, kind, TILES, numel))
                else:
                    cost = pair_cost(route, terms, terms.count, rows, columns)
                    label = f"gram, T = {terms.count}" if route == GRAM else TILES
                    found.append(CoverageRow(name, shape, kind, label, cost))
        return Coverage(tuple(found))


@contextmanager
def _hooks(layers: Sequence[_Layer], seen: dict[str, list[_Seen]]) -> Iterator[None]:
    """Note every call of the layers while inside."""

    def hook_of(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
            if output.requires_grad:
                x = (args[0] if args else kwargs["input"]).detach()
                # The edge stays that of this output if an activation then works in place.
                seen[name].append(_Seen(x, x._version, get_gradient_edge(output)))

        return hook

    handles = [layer.module.register_forward_hook(hook_of(layer.name), with_kwargs=True) for layer in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _sum(parts: Iterator[Tensor]) -> Tensor:
    total = next(parts)
    for part in parts:
        total = total + part
    return total


def _in_decoder(name: str) -> bool:
    return name == "decoder" or name.startswith("decoder.")


def _weight_gradient(layer: _Layer, call: Call, samples: int) -> Tensor:
    gradient = layer.rule.weight_gradient(layer.module, call.input, call.grad, samples)
    if call.tangent and isinstance(layer.rule, NormRule):
        # Affine in the input where a tangent wants what is linear in it.
        gradient -= layer.rule.weight_gradient(layer.module, torch.zeros_like(call.input), call.grad, samples)
    return gradient


def _parameters_under(model: nn.Module, layers: Sequence[str] | None) -> set[int]:
    if layers is None:
        return {id(parameter) for parameter in model.parameters()}
    modules = dict(model.named_modules())
    unknown = [name for name in layers if name not in modules]
    if unknown:
        raise ValueError(f"TracIn: layers: expected names of modules of the model, got {', '.join(unknown)}")
    return {id(parameter) for name in layers for parameter in modules[name].parameters()}


def _layers_of(model: nn.Module, wanted: dict[str, nn.Parameter]) -> tuple[list[_Layer], dict[str, str]]:
    """The layers with a rule, and the parameters without one with the reason."""
    names = {id(parameter): name for name, parameter in wanted.items()}
    uses: dict[str, list[tuple[str, nn.Module, str]]] = {name: [] for name in wanted}
    for module_name, module in model.named_modules():
        for kind, parameter in module.named_parameters(recurse=False):
            if id(parameter) in names:
                uses[names[id(parameter)]].append((module_name, module, kind))
    layers: dict[str, _Layer] = {}
    uncovered: dict[str, str] = {}
    for name, owners in uses.items():
        module_name, module, kind = owners[0]
        rule = rule_of(module)
        if len(owners) > 1:
            uncovered[name] = "shared by " + ", ".join(owner[0] or "the model" for owner in owners)
        elif isinstance(rule, str):
            uncovered[name] = rule
        elif kind not in ("weight", "bias"):
            uncovered[name] = f"no rule for {kind} of {type(module).__name__}"
        else:
            layer = layers.setdefault(module_name, _Layer(module_name, module, rule, False, False))
            setattr(layer, kind, True)
    return list(layers.values()), uncovered
