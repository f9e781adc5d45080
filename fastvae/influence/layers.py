"""Where the gradient of each parameter comes from: layers with a rule, or whole modules; and the hooks on them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.nn.utils.parametrize import is_parametrized

from fastvae._second_order import batchable
from fastvae.influence.modules import ModuleCall, WholeModule, places_of
from fastvae.influence.rules import NormRule, Rule, Terms, rule_of
from fastvae.influence.sweeps import Call

__all__ = ["Captured", "Layer", "SeenCall", "places_in", "sum_of", "watched"]


@dataclass
class Layer:
    """A module that a rule covers."""

    name: str
    module: nn.Module
    rule: Rule
    weight: list[str]
    """Names of the parameters that its weight is, or is computed from; empty if it takes no part."""
    bias: list[str]
    stands_in: bool = False
    """Whether the module is none of the model's but of the form of an operation of a swept network."""

    @property
    def computation(self) -> nn.Module | None:
        """What computes its weight from parameters: weight normalisation and its like."""
        return _computations(self.module).get("weight")

    def terms(self, calls: list[Call], samples: int) -> Terms | None:
        """Of all calls of a batch together; None where the weight takes no part or has no factors."""
        if not self.weight or self.computation is not None:
            return None
        found = [self.rule.terms(self.module, call.input, call.grad, samples) for call in calls]
        known = [terms for terms in found if terms is not None]
        if len(known) < len(found):
            return None
        return Terms(sum(terms.count for terms in known), known[0].inputs, known[0].outputs)

    def weight_gradient(self, calls: list[Call], samples: int) -> Tensor:
        """[B, numel], of the parameters if the weight is computed from them."""
        gradient = sum_of(_weight_gradient(self, call, samples) for call in calls)
        if (computation := self.computation) is None:
            return gradient
        ordered = self.rule.as_parameter(self.module, gradient).unflatten(1, self.module.weight.shape)
        prefix = f"{self.name}.parametrizations.weight.".lstrip(".")
        names = [name.removeprefix(prefix) for name in self.weight]
        own = {name: computation.get_parameter(name).detach() for name in names}
        with batchable():
            _, pull_back, *_ = torch.func.vjp(
                lambda own: torch.func.functional_call(computation, own, ()), own
            )
            (found,) = torch.vmap(pull_back)(ordered)
        return torch.cat([found[name].reshape(samples, -1) for name in names], 1)

    def in_order(self, kind: str, gradient: Tensor) -> Tensor:
        """A gradient in the order of the parameters' own numbers."""
        if kind == "bias" or self.computation is not None:
            return gradient
        return self.rule.as_parameter(self.module, gradient)


@dataclass
class SeenCall:
    """What a hook saw of one call of a layer."""

    input: Tensor
    version: int
    edge: GradientEdge


class Captured(NamedTuple):
    """What the gradients of a batch are made of."""

    layers: list[tuple[Layer, list[Call]]]
    modules: list[tuple[WholeModule, list[ModuleCall]]]
    of_sweep: dict[str, Tensor]
    """[B, numel] the gradients of parameters that a sweep hands out whole."""


@contextmanager
def watched(
    layers: Sequence[Layer],
    modules: Sequence[WholeModule],
    layer_calls: dict[str, list[SeenCall]],
    calls: dict[str, list[ModuleCall]],
) -> Iterator[None]:
    """Note every call of the layers and modules while inside."""

    def of_layer(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
            if output.requires_grad:
                x = (args[0] if args else kwargs["input"]).detach()
                # The edge stays that of this output if an activation then works in place.
                layer_calls[name].append(SeenCall(x, x._version, get_gradient_edge(output)))

        return hook

    def of_module(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            if (call := ModuleCall.of_output(args, kwargs, output)) is not None:
                calls[name].append(call)

        return hook

    hooks = [(layer.module, of_layer(layer.name)) for layer in layers]
    hooks += [(whole.module, of_module(whole.name)) for whole in modules]
    handles = [module.register_forward_hook(hook, with_kwargs=True) for module, hook in hooks]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def places_in(
    model: nn.Module, wanted: dict[str, nn.Parameter]
) -> tuple[list[Layer], dict[str, str], dict[str, list[str]]]:
    """The layers with a rule, the parameters without one with the reason, and what else these may be taken through.

    The last are names of modules, innermost first, of every parameter; none of one that nothing could help.
    """
    names = {id(parameter): name for name, parameter in wanted.items()}
    uses: dict[str, list[tuple[str, nn.Module, str]]] = {name: [] for name in wanted}
    computed: dict[int, tuple[str, nn.Module, str]] = {}
    for module_name, module in model.named_modules():
        for kind, computation in _computations(module).items():
            computed |= {id(p): (module_name, module, kind) for p in computation.parameters()}
        for kind, parameter in module.named_parameters(recurse=False):
            if id(parameter) in names:
                uses[names[id(parameter)]].append((module_name, module, kind))
    layers: dict[str, Layer] = {}
    reasons: dict[str, str] = {}
    places: dict[str, list[str]] = {}
    for name, owners in uses.items():
        module_name, module, kind = computed.get(id(wanted[name]), owners[0])
        rule = rule_of(module)
        places[name] = list(places_of([owner[0] for owner in owners], model))
        if len(owners) > 1:
            reasons[name] = "shared by " + ", ".join(owner[0] or "the model" for owner in owners)
        elif isinstance(rule, str):
            reasons[name] = rule
            if not rule.startswith("no rule"):  # no way helps
                places[name] = []
        elif kind not in ("weight", "bias") or (kind == "bias" and id(wanted[name]) in computed):
            reasons[name] = f"no rule for {kind} of {type(module).__name__}"
        else:
            layer = layers.setdefault(module_name, Layer(module_name, module, rule, [], []))
            getattr(layer, kind).append(name)
    return list(layers.values()), reasons, places


def _computations(module: nn.Module) -> dict[str, nn.Module]:
    """By tensor, what computes it from parameters (torch.nn.utils.parametrize)."""
    return dict(module.parametrizations.items()) if is_parametrized(module) else {}  # type: ignore[union-attr, operator]


def sum_of(parts: Iterator[Tensor]) -> Tensor:
    """Of at least one."""
    total = next(parts)
    for part in parts:
        total = total + part
    return total


def _weight_gradient(layer: Layer, call: Call, samples: int) -> Tensor:
    gradient = layer.rule.weight_gradient(layer.module, call.input, call.grad, samples)
    if call.tangent and isinstance(layer.rule, NormRule):
        # Affine in the input where a tangent wants what is linear in it.
        gradient -= layer.rule.weight_gradient(layer.module, torch.zeros_like(call.input), call.grad, samples)
    return gradient
