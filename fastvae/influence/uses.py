"""How a network that was read uses its parameters, and what that makes of the gradients of samples.

A weight that linear layers or convolutions use, all in one way, goes by factors: all pairs of its uses. Of any other
the gradient is made sample by sample, side by side: by such a layer's rule where it has one, else under torch.vmap
through the operations that use it alone; and, where it is computed (weight normalisation), on through what computes it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Container, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastvae._second_order import batchable
from fastvae.influence.layers import Layer
from fastvae.influence.layouts import Layout, layouts_of
from fastvae.influence.modules import split_samples
from fastvae.influence.rules import Rule, rule_of
from fastvae.influence.sweeps import Call
from fastvae.network.cache import ReadNetwork
from fastvae.network.layers import Layer as SweptLayer
from fastvae.network.layers import Point
from fastvae.network.layers.affine import AffineLayer, ConvolutionLayer, LinearLayer, SameConvolution

__all__ = ["Seen", "Uses"]


class Seen(NamedTuple):
    """A layer at one point: its inputs by number, the cotangents of its tangent and of its result, inputs' tangents."""

    values: dict[int, Any]
    dy_dot: Any
    dy: Any
    dots: dict[int, Any]


class Uses:
    """The parameters of a network by how they are used.

    Args:
        network: as it was read.
        name_of: by source, the parameters that are asked for.
        numels: of all that are asked for, used or not.
        z, condition: rows of the form for which it was read.

    Raises:
        ValueError: samples that cannot be told apart.
    """

    def __init__(
        self,
        network: ReadNetwork,
        name_of: Mapping[int, str],
        numels: Mapping[str, int],
        z: Tensor,
        condition: Tensor | None,
    ) -> None:
        self.sweeps, self.program = network.sweeps, network.sweeps.program
        self._layouts, self._unfit = layouts_of(network, z, condition)
        self._like = z.detach()[:1].clone()
        self._by_index = {layer.index: layer for layer in self.sweeps.layers}
        self.name_of, self.numels = dict(name_of), dict(numels)
        self.made_of: dict[int, frozenset[str]] = {at: frozenset({n}) for at, n in self.name_of.items()}
        """By number of a passive value, the parameters that it is computed from."""
        computed: dict[str, str] = {}
        for operation in self.program.passive:
            found = frozenset().union(*(self.made_of.get(slot, ()) for slot in operation.slots))
            if found and not operation.is_number:
                self.made_of[operation.index] = found
                computed |= dict.fromkeys(found, operation.kind)
        self.slots = {layer.index: self._slots_of(layer) for layer in self.sweeps.layers}
        """By layer, the values made of parameters that it reads."""
        users: dict[str, list[tuple[SweptLayer, int]]] = {}
        for layer in self.sweeps.layers:
            for slot in self.slots[layer.index]:
                for name in self.made_of[slot]:
                    users.setdefault(name, []).append((layer, slot))
        self.layers: dict[str, Layer] = {}
        """What goes by factors, with stand-ins for the modules, by the name of its weight or bias."""
        self._members: dict[str, list[int]] = {}
        """The layers of each."""
        self.dense = {name: "not used" for name in numels if name not in users}
        """All others, with a rule in words for coverage."""
        roles = {name: None if name in computed else self._role(uses) for name, uses in users.items()}
        biases = {name: uses for name, uses in users.items() if roles[name] == "bias"}
        for name, uses in users.items():
            if roles[name] is None:
                kinds = [computed[name]] if name in computed else []
                kinds += [each.kind for layer, _ in uses for each in layer.operations[:1]]
                self.dense[name] = f"Hamiltonian flow: {', '.join(dict.fromkeys(kinds))}, by torch.vmap"
            elif roles[name] == "weight":
                # A bias belongs to a weight whose uses are its own.
                members = [layer for layer, _ in uses]
                own = next((b for b, of in biases.items() if [layer for layer, _ in of] == members), None)
                biases.pop(own or "", None)
                self._add(name, members, [name], [] if own is None else [own])
        for name, uses in biases.items():
            self._add(name, [layer for layer, _ in uses], [], [name])
        self.by_factors = {name for layer in self.layers.values() for name in (*layer.weight, *layer.bias)}

    @property
    def names(self) -> set[str]:
        """All parameters that are asked for."""
        return self.by_factors | self.dense.keys()

    def layers_of(self, wanted: Container[str]) -> list[Layer]:
        """What goes by factors, of these parameters."""
        found = []
        for layer in self.layers.values():
            weight, bias = (
                [name for name in names if name in wanted] for names in (layer.weight, layer.bias)
            )
            if weight or bias:
                found.append(dataclasses.replace(layer, weight=weight, bias=bias))
        return found

    @staticmethod
    def names_of_sources(network: ReadNetwork, names: Mapping[int, str]) -> dict[int, str]:
        """By source of a network the name of its parameter, of these by id."""
        return {
            at: names[id(tensor)]
            for at, tensor in enumerate(network.tensors, 1)
            if tensor is not None and id(tensor) in names
        }

    def _add(self, name: str, members: Sequence[SweptLayer], weight: list[str], bias: list[str]) -> None:
        module, rule = self._stand_in(members[0])
        self.layers[name] = Layer(name, module, rule, weight, bias, stands_in=True)
        self._members[name] = [layer.index for layer in members]

    def _slots_of(self, layer: SweptLayer) -> list[int]:
        slots = dict.fromkeys(slot for operation in layer.operations for slot in operation.slots)
        return [slot for slot in slots if slot in self.made_of]

    def _role(self, uses: Sequence[tuple[SweptLayer, int]]) -> str | None:
        """What a parameter is to all layers that use it, if they are alike; None where it goes by no factors."""
        forms = {self._form(layer) for layer, _ in uses}
        found = set()
        for layer, slot in uses:
            if isinstance(layer, AffineLayer) and layer.weight != layer.bias:
                found.add("weight" if slot == layer.weight else "bias")
        return found.pop() if len(forms) == len(found) == 1 and None not in forms else None

    def _form(self, layer: SweptLayer) -> Any:
        """What a layer's rule depends on; None where it has none."""
        if not isinstance(layer, AffineLayer) or layer.x in self._unfit:
            return None
        axis, rank = self._layout(layer.x).axis, len(self._layout(layer.weight).shape)
        if type(layer) is LinearLayer and rank == 2 and axis is not None:
            return "linear"
        if type(layer) in (ConvolutionLayer, SameConvolution) and axis == 0:
            return type(layer), str(layer.geometry), rank  # type: ignore[attr-defined]
        return None

    def _stand_in(self, layer: SweptLayer) -> tuple[nn.Module, Rule]:
        """A module for which there is a rule, of the layer's form, without numbers."""
        assert isinstance(layer, AffineLayer)
        weight = torch.empty(self._layout(layer.weight).shape, device="meta")
        module: nn.Module
        if not isinstance(layer, ConvolutionLayer):
            module = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
        else:
            (first, second, *kernel), geometry = weight.shape, layer.geometry
            options: dict[str, Any] = {"stride": geometry.stride, "dilation": geometry.dilation}
            if geometry.transposed:
                name, channels = "ConvTranspose", (first, second * geometry.groups)
                options["output_padding"] = tuple(geometry.output_padding)
            else:
                name, channels = "Conv", (second * geometry.groups, first)
            options = {key: tuple(value) for key, value in options.items()}
            padding = "same" if isinstance(layer, SameConvolution) else tuple(geometry.padding)
            module = getattr(nn, f"{name}{len(kernel)}d")(
                *channels, tuple(kernel), padding=padding, groups=geometry.groups, bias=False, device="meta", **options
            )  # fmt: skip
        rule = rule_of(module)
        assert isinstance(rule, Rule)
        return module, rule

    # ---- gradients ----

    def see(
        self, layer: SweptLayer, point: Point, dy_dot: Any, dy: Any, dots: Sequence[Any], samples: int
    ) -> Seen:
        """A layer at one point, with a row of codes for each of so many samples."""
        result = self._layouts[layer.index]

        def of_result(cotangent: Any) -> Any:
            if isinstance(cotangent, dict) and isinstance(result, list):
                return {part: result[part].ordered(each, samples) for part, each in cotangent.items()}
            return result.ordered(cotangent, samples) if isinstance(result, Layout) else cotangent

        slots = {slot for operation in layer.operations for slot in operation.slots}
        slots -= self._unfit | {operation.index for operation in layer.operations}
        values = {slot: self._ordered(point.values[slot], slot, samples) for slot in slots}
        moved = {slot: self._ordered(dots[slot], slot, samples) for slot in slots if dots[slot] is not None}
        return Seen(values, of_result(dy_dot), of_result(dy), moved)

    def _ordered(self, value: Any, slot: int, samples: int) -> Any:
        known = self._layouts[slot]
        return known.ordered(value, samples) if isinstance(known, Layout) else value

    def calls(self, name: str, seen: Mapping[int, Sequence[Seen]]) -> list[Call]:
        """Of the weight or bias of that name, at all points."""
        return [call for index in self._members[name] for call in self._calls_of(index, seen)]

    def _calls_of(self, index: int, seen: Mapping[int, Sequence[Seen]]) -> list[Call]:
        layer = self._by_index[index]
        assert isinstance(layer, AffineLayer)
        axis = self._layout(layer.x).axis or 0
        found = []
        for each in seen.get(index, ()):
            x, dot = each.values[layer.x], each.dots.get(layer.x)
            if each.dy_dot is not None:
                found.append(Call(x.movedim(axis, 0), each.dy_dot.movedim(axis, 0)))
            if each.dy is not None and dot is not None:
                found.append(Call(dot.movedim(axis, 0), each.dy.movedim(axis, 0), tangent=True))
        return found

    def gradients(
        self,
        names: Sequence[str],
        seen: Mapping[int, Sequence[Seen]],
        network: ReadNetwork,
        rows: int,
        samples: int,
    ) -> dict[str, Tensor]:
        """[B, numel] of each of these, where they can be found; none of what no point depends on.

        Args:
            seen: by layer, at all points.
            network: with its current tensors.
            rows: of the codes.
            samples: B, of which each has as many rows.
        """
        wanted = set(names)
        totals: dict[int, Tensor] = {}
        broken: set[str] = set()
        for layer in self.sweeps.layers:
            slots = [slot for slot in self.slots[layer.index] if wanted & self.made_of[slot]]
            points = seen.get(layer.index)
            if not slots or not points:
                continue
            try:
                found = self._of_layer(layer, slots, points, seen, samples)
            # Whatever an operation raises that torch.vmap cannot run.
            except Exception:
                broken |= {name for slot in slots for name in self.made_of[slot]}
                continue
            for slot, gradient in found.items():
                totals[slot] = totals[slot] + gradient if slot in totals else gradient
        try:
            by_name = self._of_sources(totals, network, rows // samples, samples)
        except Exception:
            return {}
        # What no point depends on has gradients of zero.
        return {
            name: by_name[name] if name in by_name else self._like.new_zeros(samples, self.numels[name])
            for name in names
            if name not in broken
        }

    def _of_layer(
        self,
        layer: SweptLayer,
        slots: Sequence[int],
        points: Sequence[Seen],
        seen: Mapping[int, Sequence[Seen]],
        samples: int,
    ) -> dict[int, Tensor]:
        if self._form(layer) is None or not isinstance(layer, AffineLayer) or layer.weight == layer.bias:
            return self._by_vmap(layer, slots, points, samples)
        module, rule = self._stand_in(layer)
        found: dict[int, Tensor] = {}
        for call in self._calls_of(layer.index, seen):
            if layer.weight in slots:
                each = rule.as_parameter(module, rule.weight_gradient(module, call.input, call.grad, samples))
                each = each.unflatten(1, self._layout(layer.weight).shape)
                found[layer.weight] = found[layer.weight] + each if layer.weight in found else each
            if layer.bias in slots and not call.tangent:
                each = rule.bias_gradient(module, call.input, call.grad, samples)
                found[layer.bias] = found[layer.bias] + each if layer.bias in found else each
        return found

    def _by_vmap(
        self, layer: SweptLayer, slots: Sequence[int], points: Sequence[Seen], samples: int
    ) -> dict[int, Tensor]:
        """Of <dy_dot, y> + <dy, the derivative of y along the tangents>, with all points as rows beside each other."""
        needed = {slot for operation in layer.operations for slot in operation.slots}
        needed -= {operation.index for operation in layer.operations}
        if needed & self._unfit:
            raise ValueError("TracIn: samples cannot be told apart")
        axes: dict[int, int] = {
            slot: axis for slot in needed if (axis := self._layout(slot).axis) is not None
        }
        fixed = {slot: points[0].values[slot] for slot in needed - axes.keys()}
        moving, dots = {}, {}
        for slot, axis in axes.items():
            given = [point.values[slot] for point in points]
            # What depends on samples and not on codes is the same at all points.
            moving[slot] = _side_by_side(given[:1] if slot in slots else given, axis, samples)
            along = [point.dots.get(slot) for point in points]
            if any(dot is not None for dot in along):
                dots[slot] = _side_by_side(_with_zeros(along), axis, samples)
        dy_dot = self._cotangents(layer, [point.dy_dot for point in points], samples)
        dy = self._cotangents(layer, [point.dy for point in points], samples) if dots else {}
        shared = {slot: fixed.pop(slot) for slot in slots if slot in fixed}
        own = {slot: moving.pop(slot) for slot in slots if slot in moving}

        def total(weights: dict[int, Tensor], *others: dict[int, Tensor]) -> Tensor:
            moving, dots, dy_dot, dy = others
            repeated = {
                slot: torch.cat([each] * len(points), axes[slot]) if slot in axes else each
                for slot, each in weights.items()
            }

            def product(active: dict[int, Tensor], cotangents: dict[int, Tensor]) -> Tensor:
                parts = self._results(layer, fixed | moving | repeated | active)
                return torch.stack([(parts[part] * each).sum() for part, each in cotangents.items()]).sum()

            found = [product({}, dy_dot)] if dy_dot else []
            if dy:
                bent = torch.func.grad(product)({slot: moving[slot] for slot in dots}, dy)
                found += [(bent[slot] * dot).sum() for slot, dot in dots.items()]
            return torch.stack(found).sum()

        with torch.no_grad(), batchable():
            in_dims = dict.fromkeys(shared) | dict.fromkeys(own, 0)
            of_one = torch.vmap(torch.func.grad(total), (in_dims, 0, 0, 0, 0))
            gradients: dict[int, Tensor] = of_one(shared | own, moving, dots, dy_dot, dy)
        return gradients

    def _results(self, layer: SweptLayer, values: dict[int, Any]) -> list[Any]:
        everything: list[Any] = [None] * self.program.size
        for slot, value in values.items():
            everything[slot] = value
        for operation in layer.operations:
            everything[operation.index] = operation.call(everything)
        result = everything[layer.index]
        return [result] if isinstance(result, Tensor) else list(result)

    def _cotangents(self, layer: SweptLayer, given: Sequence[Any], samples: int) -> dict[int, Tensor]:
        """By part of the result, zeros at points that have none."""
        by_part = [{} if each is None else {0: each} if isinstance(each, Tensor) else each for each in given]
        found = {}
        for part in sorted(set().union(*by_part)):
            value = self._layouts[layer.index]
            axis = (value[part] if isinstance(value, list) else value).axis
            if axis is None:
                raise ValueError("TracIn: a result without samples")
            found[part] = _side_by_side(_with_zeros([each.get(part) for each in by_part]), axis, samples)
        return found

    def _of_sources(
        self, totals: dict[int, Tensor], network: ReadNetwork, rows: int, samples: int
    ) -> dict[str, Tensor]:
        """From gradients to what layers read, those to what it is computed from."""
        found: dict[str, Tensor] = {}
        for slot, total in totals.items():
            if slot in self.name_of:
                name, flat = self.name_of[slot], total.reshape(samples, -1)
                found[name] = found[name] + flat if name in found else flat
        computed = {slot: total for slot, total in totals.items() if slot not in self.name_of}
        if not computed:
            return found
        reached = frozenset().union(*(self.made_of[slot] for slot in computed))
        tensors = list(network.tensors)
        own = {at: tensors[at - 1].detach() for at, name in self.name_of.items() if name in reached}  # type: ignore[union-attr]
        given = {
            at: split_samples(tensor, 0, samples)
            for at, (source, tensor) in enumerate(zip(self.program.sources, tensors, strict=True), 1)
            if source.is_condition and tensor is not None
        }
        like = self._like.new_zeros(rows, *self._like.shape[1:])

        def product(own: dict[int, Tensor], given: dict[int, Tensor], totals: dict[int, Tensor]) -> Tensor:
            now = [t if t is None else t.detach() for t in tensors]
            for at, tensor in (own | given).items():
                now[at - 1] = tensor
            values = self.program.start(like, now)
            return torch.stack([(values[slot] * total).sum() for slot, total in totals.items()]).sum()

        with torch.no_grad(), batchable():
            gradients = torch.vmap(torch.func.grad(product), (None, 0, 0))(own, given, computed)
        for at, gradient in gradients.items():
            name, flat = self.name_of[at], gradient.reshape(samples, -1)
            found[name] = found[name] + flat if name in found else flat
        return found

    def _layout(self, slot: int) -> Layout:
        found = self._layouts[slot]
        assert isinstance(found, Layout)
        return found


def _with_zeros(tensors: Sequence[Tensor | None]) -> list[Tensor]:
    like = next(each for each in tensors if each is not None)
    return [torch.zeros_like(like) if each is None else each for each in tensors]


def _side_by_side(tensors: Sequence[Tensor], axis: int, samples: int) -> Tensor:
    """[B, ...] of each sample the rows of all these."""
    return torch.cat([split_samples(each, axis, samples) for each in tensors], axis + 1)
