"""The factors of a batch's gradients, from one forward and backward pass with hooks on the layers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastvae.influence.audit import audit
from fastvae.influence.coverage import Coverage, CoverageRow, UncoveredParameter
from fastvae.influence.evaluation import Batch, Evaluation
from fastvae.influence.factors import GRAM, TILES, Factors, cheaper_route, pair_cost, self_route
from fastvae.influence.layers import Captured, Layer, SeenCall, places_in, sum_of, watched
from fastvae.influence.modules import ModuleCall, WholeModule
from fastvae.influence.read_sweeps import is_of_decoder
from fastvae.influence.rules import Terms
from fastvae.influence.sweeps import Call, flow_parameters
from fastvae.influence.uses import Uses

__all__ = ["Engine"]


class Engine:
    """Per-sample gradients of a model's loss over its trained parameters, in factored form.

    Args:
        model: any module, a private copy in eval mode; ``bind`` exchanges it for that of another checkpoint.
        layers: names of the modules whose parameters take part; None: all.
        uncovered: "error", or "materialise": the gradients of parameters that neither a rule nor a module by itself
            gives are computed by autograd, sample by sample.
        swept: whether the decoder goes by its own kernels (sweeps.py).
        uses: of its parameters by the decoder, where that is read and swept in PyTorch (read_sweeps.py).

    Raises:
        UncoveredParameter: by "error".
        ValueError: a name in ``layers`` that the model does not have, or nothing to differentiate.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Sequence[str] | None,
        uncovered: str,
        swept: bool,
        uses: Uses | None = None,
    ) -> None:
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
        for name, parameter in wanted.items():
            if parameter.dtype not in (torch.float32, torch.float64):
                raise TypeError(
                    f"TracIn: model: expected parameters in float32 or float64, got {parameter.dtype} at {name!r}; "
                    "score model.float(), or leave it out by layers="
                )
        if not wanted:
            raise ValueError("TracIn: the model has no trained parameter among the chosen layers")
        self.parameters = wanted
        taken = [name for name in wanted if uses is not None and name in uses.names]
        hooked = {name: parameter for name, parameter in wanted.items() if name not in taken}
        self._layers, without_rule, self._places = places_in(model, hooked)
        self._places |= {name: [] for name in taken}
        self._modules: dict[str, WholeModule] = {}
        self._uncovered: dict[str, str] = {}
        of_flow = flow_parameters(model) if swept or uses is not None else []
        self.of_sweep = {name: "Hamiltonian flow" for name in of_flow if name in wanted}
        """Parameters whose gradients a sweep hands out whole, with the rule."""
        for name in self.of_sweep:
            without_rule.pop(name, None)
        if uses is not None:
            shared = [name for name in hooked if is_of_decoder(name)]
            without_rule |= dict.fromkeys(shared, "shared by the decoder and what is outside of it")
            self._places |= {name: [] for name in shared}
            self._layers += uses.layers_of(wanted)
            self.of_sweep |= {name: rule for name, rule in uses.dense.items() if name in wanted}
        for penalty in getattr(model, "penalties", ()):
            if getattr(penalty, "couples_samples", False):
                raise ValueError(
                    f"TracIn: {type(penalty).__name__}: expected a term of each sample alone, got one that depends on "
                    "the batch, so that no sample has a gradient of its own (FreeBits: per='sample' is none such)"
                )
            if getattr(penalty, "differentiates_decoder", False):
                reason = (
                    f"{type(penalty).__name__} differentiates the decoder, and its gradient is no layer's own"
                )
                of_decoder = [name for name in wanted if _in_decoder(name)]
                without_rule |= dict.fromkeys(of_decoder, reason)
                self._places |= {name: [] for name in of_decoder}
        self._reasons: dict[str, str] = {}
        for name, reason in without_rule.items():
            self.move(name, reason)
        self._terms: dict[str, Terms | None] = {}
        self._rows: dict[Any, dict[str, list[float]]] = {}
        """Of a loss, how many rows each layer is given for a sample, call by call, as ``audit`` saw it."""
        self._audited: set[Any] = set()

    def bind(self, model: nn.Module) -> None:
        """Work on another copy of the model, of which the same parameters are differentiated."""
        parameters, modules = dict(model.named_parameters()), dict(model.named_modules())
        known = [*self.parameters, *(layer.name for layer in self._layers), *self._modules]
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
            if not layer.stands_in:
                layer.module = modules[layer.name]
        for whole in self._modules.values():
            whole.module = modules[whole.name]

    def move(self, name: str, reason: str) -> None:
        """Take the gradient of a parameter in the next way that there is, from its layer outwards.

        Raises:
            UncoveredParameter: there is none but sample by sample, and nobody asked for it.
        """
        self._reasons.setdefault(name, reason)
        self.of_sweep.pop(name, None)
        for part in self._layers:
            part.weight = [each for each in part.weight if each != name]
            part.bias = [each for each in part.bias if each != name]
        self._layers = [layer for layer in self._layers if layer.weight or layer.bias]
        for whole in list(self._modules.values()):
            whole.parameters = [each for each in whole.parameters if whole.full_name(each) != name]
            if not whole.parameters:
                del self._modules[whole.name]
        if not self._places[name]:
            if not self._materialise:
                raise UncoveredParameter(name, self._reasons[name])
            self._uncovered[name] = self._reasons[name]
            return
        place = self._places[name].pop(0)
        module = self.model.get_submodule(place)
        by_id = {id(parameter): own for own, parameter in module.named_parameters()}
        own = by_id[id(self.parameters[name])]
        self._modules.setdefault(place, WholeModule(place, module)).parameters.append(own)

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
        apart = [
            *self._uncovered,
            *self.of_sweep,
            *(name for whole in self._modules.values() for name in whole.names),
        ]
        numel = sum(self.parameters[name].numel() for name in apart)
        for layer in self._layers:
            if self._terms[layer.name] is None or routes[layer.name] == TILES:
                numel += sum(self.parameters[name].numel() for name in (*layer.weight, *layer.bias))
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
        captured = self.capture(evaluation, batch, fold, 1 / draws if fold else 1.0)
        found.dense += [captured.of_sweep[name] for name in self.of_sweep]
        for layer, calls in captured.layers:
            self.add_factors(found, layer, calls, routes[layer.name], samples)
        each = 1 if fold else draws
        found.dense += [whole.gradients(calls, samples, each) for whole, calls in captured.modules]
        if self._uncovered:
            found.dense.append(self.by_autograd(evaluation, batch, list(self._uncovered), fold))
        return found.in_one_dtype()

    def add_factors(self, found: Factors, layer: Layer, calls: list[Call], route: str, samples: int) -> None:
        """Append what the calls of a layer make of its gradients, by this route."""
        rule, module = layer.rule, layer.module
        if layer.weight and route == GRAM:
            pairs = [rule.factors(module, call.input, call.grad, samples) for call in calls]
            bias = bool(layer.bias) and rule.bias_in_terms
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
            found.dense.append(layer.weight_gradient(calls, samples))
        if layer.bias and not (layer.weight and route == GRAM and rule.bias_in_terms):
            of_bias = [call for call in calls if not call.tangent]
            found.dense.append(
                sum_of(rule.bias_gradient(module, call.input, call.grad, samples) for call in of_bias)
            )

    def capture(self, evaluation: Evaluation, batch: Batch, fold: bool, scale: float) -> Captured:
        """Every layer and module with what it was given and the gradient at what it gave."""
        if not self._modules and (known := evaluation.calls(batch, fold)) is not None:
            return Captured([(each, known[each.name]) for each in self._layers if each.name in known], [], {})
        sweep = evaluation.sweep()
        samples = len(batch[0]) * (1 if fold else evaluation.draws_of(batch))
        hooked = [
            layer
            for layer in self._layers
            if not layer.stands_in and (sweep is None or not _in_decoder(layer.name))
        ]
        layer_calls: dict[str, list[SeenCall]] = {layer.name: [] for layer in hooked}
        of_modules: dict[str, list[ModuleCall]] = {name: [] for name in self._modules}
        with torch.enable_grad(), watched(hooked, list(self._modules.values()), layer_calls, of_modules):
            total = evaluation.losses(batch, fold, sweep).sum()
        flat = [(name, call) for name, calls in layer_calls.items() for call in calls]
        outputs = [(call, place) for calls in of_modules.values() for call in calls for place in call.outputs]
        changed = [name for name, call in flat if call.input._version != call.version]
        changed += [name for name, calls in of_modules.items() if any(call.was_changed for call in calls)]
        if changed:
            raise ValueError(f"TracIn: {changed[0]}: its input was changed in place after the layer read it")
        if fold:
            self._check_rows(evaluation, layer_calls, samples)
        edges = [call.edge for _, call in flat] + [call.outputs[place] for call, place in outputs]
        edges += [] if sweep is None else sweep.edges
        grads = (
            torch.autograd.grad(total, edges, total.new_full((), scale), allow_unused=True) if edges else ()
        )
        found: dict[str, list[Call]] = {}
        for (name, call), grad in zip(flat, grads, strict=False):
            if grad is not None:
                found.setdefault(name, []).append(Call(call.input, grad))
        for (of_module, place), grad in zip(outputs, grads[len(flat) :], strict=False):
            if grad is not None:
                of_module.grads[place] = grad
        own: dict[str, Tensor] = {}
        if sweep is not None:
            found |= {layer.name: sweep.calls(layer.name) for layer in self._layers if layer not in hooked}
            own = sweep.gradients(list(self.of_sweep), samples) if self.of_sweep else {}
        # What the losses do not depend on has gradients of zero.
        layers = [(layer, found[layer.name]) for layer in self._layers if found.get(layer.name)]
        used = {name: [call for call in calls if call.grads] for name, calls in of_modules.items()}
        modules = [(whole, used[name]) for name, whole in self._modules.items() if used[name]]
        return Captured(layers, modules, own)

    def _check_rows(
        self, evaluation: Evaluation, layer_calls: dict[str, list[SeenCall]], samples: int
    ) -> None:
        """Rows that a mask chooses, or that are sent to one of several layers, cannot be told apart by sample."""
        known = self._rows.setdefault(evaluation.loss_fn, {})
        for name, calls in layer_calls.items():
            found = [len(call.input) / samples for call in calls if call.input.dim()]
            if not self.audited(evaluation):
                known.setdefault(name, found)
            elif found != known.get(name, found):
                raise ValueError(
                    f"TracIn: {name}: expected {known[name]} rows a sample in its calls, as the first samples had, got "
                    f"{found}: of rows that are chosen nobody knows whose they are. Leave the layer out by layers=, or "
                    "have samples first that show it, with uncovered='materialise'"
                )

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
                rows.append(torch.cat([(g.to_dense() if g.is_sparse else g).flatten() for g in grads]))
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
        self._rows.pop(evaluation.loss_fn, None)
        terms = audit(self, evaluation, batch)
        self._terms = {layer.name: terms.get(layer.name) for layer in self._layers}
        # One sample alone does not show where samples lie: the next batch is compared, too.
        if len(batch[0]) > 1:
            self._audited.add(evaluation.loss_fn)

    def coverage(self, rows: int, columns: int) -> Coverage:
        """The rule and route of every parameter, for ``rows`` samples with ``columns`` others."""
        routes = self.routes(rows, columns)
        owners = {name: layer for layer in self._layers for name in (*layer.weight, *layer.bias)}
        wholes = {name: whole for whole in self._modules.values() for name in whole.names}
        found = []
        for name, parameter in self.model.named_parameters():
            shape, numel = tuple(parameter.shape), parameter.numel()
            if name in self._absent:
                found.append(CoverageRow(name, shape, self._absent[name][1], "", 0.0))
            elif name in self.of_sweep:
                found.append(CoverageRow(name, shape, self.of_sweep[name], TILES, numel))
            elif name in self._uncovered:
                rule = f"autograd, sample by sample: {self._uncovered[name]}"
                found.append(CoverageRow(name, shape, rule, TILES, numel))
            elif name in wholes:
                kind = type(wholes[name].module).__name__
                found.append(CoverageRow(name, shape, f"{kind}, by torch.vmap", TILES, numel))
            else:
                layer = owners[name]
                terms, route = self._terms[layer.name], routes[layer.name]
                kind = type(layer.module).__name__
                if name in layer.bias and route == GRAM and layer.rule.bias_in_terms and layer.weight:
                    found.append(CoverageRow(name, shape, kind, "gram", 0.0))
                elif name in layer.bias or terms is None:
                    found.append(CoverageRow(name, shape, kind, TILES, numel))
                else:
                    cost = pair_cost(route, terms, terms.count, rows, columns)
                    label = f"gram, T = {terms.count}" if route == GRAM else TILES
                    found.append(CoverageRow(name, shape, kind, label, cost))
        return Coverage(tuple(found))


def _in_decoder(name: str) -> bool:
    return name == "decoder" or name.startswith("decoder.")


def _parameters_under(model: nn.Module, layers: Sequence[str] | None) -> set[int]:
    if layers is None:
        return {id(parameter) for parameter in model.parameters()}
    modules = dict(model.named_modules())
    unknown = [name for name in layers if name not in modules]
    if unknown:
        raise ValueError(f"TracIn: layers: expected names of modules of the model, got {', '.join(unknown)}")
    return {id(parameter) for name in layers for parameter in modules[name].parameters()}
