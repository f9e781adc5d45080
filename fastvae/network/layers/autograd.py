"""An operation that no rule knows: its rules are autograd's, on that operation alone.

reverse is one vector-Jacobian product with its graph; tangent and bend are gradients of it, which is right where
PyTorch's derivatives of forward mode are not. After a force's reverse both are one gradient of its graph.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastvae.network.tape import Held, kernel

from .base import Gradients, Layer, Point, Products, Values


class _Graph(NamedTuple):
    """One evaluation."""

    leaves: dict[int, Tensor]
    """By slot, the inputs that may need a gradient."""
    parts: list[Any]
    """The results, of which tensors have a graph from the leaves."""


class _Pulled(NamedTuple):
    """One reverse that can be differentiated."""

    seeds: list[Tensor]
    """The cotangents of all results that have a graph, as leaves."""
    found: dict[int, Tensor]
    """By slot, the gradients that have a graph."""


@dataclasses.dataclass
class _Kept:
    """What one evaluation leaves for the rules."""

    graph: Held
    leaves: list[int]
    is_one: bool
    dy: Any = None
    """Cotangents of the reverse that can be differentiated, by place."""
    pulled: Held | None = None
    dots: list[Any] = dataclasses.field(default_factory=list)
    """Tangents of which ``bends`` are."""
    bends: Sequence[Tensor | None] | None = None


class AutogradLayer(Layer):
    """One operation through PyTorch's autograd.

    Each rule is one call for straight code (tape.py), to which the graph is handed on.
    """

    many = False
    by_autograd = True
    keeps_output = False
    keeps_inputs = False

    def __init__(self, operation: Any, active: Sequence[bool]) -> None:
        super().__init__(operation, active)
        self.is_active = {slot: active[slot] for slot in self.slots}

    def forward(self, point: Point) -> Any:
        """y, with a graph of its own from the inputs that need one."""
        given = [point.values[slot] for slot in self.slots]
        wanted = [bool(point.wanted[slot]) for slot in self.slots]
        graph, results = kernel(self._evaluate, len(point.values), given, wanted)
        leaves = [
            slot
            for slot, value, may in zip(self.slots, given, wanted, strict=True)
            if may and _is_continuous(value)
        ]
        point.kept[self.index] = _Kept(graph, leaves, isinstance(results, Tensor))
        return results

    def _evaluate(self, size: int, given: Sequence[Any], wanted: Sequence[bool]) -> tuple[Held, Any]:
        values: list[Any] = [None] * size
        leaves: dict[int, Tensor] = {}
        for slot, value, may in zip(self.slots, given, wanted, strict=True):
            if may and _is_continuous(value):
                value = leaves[slot] = value.detach().requires_grad_()
            values[slot] = value
        with torch.enable_grad():
            y = self.operation.call(values)
        if isinstance(y, Tensor):
            return Held(_Graph(leaves, [y])), y.detach()
        parts = type(y)(part.detach() if isinstance(part, Tensor) else part for part in y)
        return Held(_Graph(leaves, list(y))), parts

    def reverse(self, point: Point, dy: Any, grads: Gradients, products: Products | None) -> None:
        """One vector-Jacobian product; that of a force can be differentiated."""
        kept: _Kept = point.kept[self.index]
        slots = [slot for slot in kept.leaves if products is not None or self.is_active[slot]]
        if not slots:
            return
        places, cotangents = _by_place(dy)
        if products is None and point.bends_later:
            kept.pulled, found = kernel(self._pull, kept.graph, slots, places, cotangents)
            kept.dy, kept.bends = dict(zip(places, cotangents, strict=True)), None
        else:
            found = kernel(self._vjp, kept.graph, slots, places, cotangents)
        for slot, gradient in zip(slots, found, strict=True):
            grads.add(slot, gradient)

    def _pull(
        self, graph: Held, slots: Sequence[int], places: Sequence[int], dy: Sequence[Tensor]
    ) -> tuple[Held | None, Sequence[Tensor | None]]:
        outputs, cotangents = _reached(graph.value, places, dy)
        has_graph = [part for part in graph.value.parts if isinstance(part, Tensor) and part.requires_grad]
        if not outputs or len(outputs) < len(has_graph):
            return None, self._vjp(graph, slots, places, dy)
        seeds = [cotangent.detach().requires_grad_() for cotangent in cotangents]
        leaves = [graph.value.leaves[slot] for slot in slots]
        found = torch.autograd.grad(outputs, leaves, seeds, create_graph=True, allow_unused=True)
        pulled = {
            slot: gradient
            for slot, gradient in zip(slots, found, strict=True)
            if gradient is not None and gradient.requires_grad
        }
        values = [None if gradient is None else gradient.detach() for gradient in found]
        return Held(_Pulled(seeds, pulled)), values

    def _vjp(
        self, graph: Held, slots: Sequence[int], places: Sequence[int], dy: Sequence[Tensor]
    ) -> Sequence[Tensor | None]:
        outputs, cotangents = _reached(graph.value, places, dy)
        if not outputs:
            return [None] * len(slots)
        leaves = [graph.value.leaves[slot] for slot in slots]
        return torch.autograd.grad(outputs, leaves, cotangents, retain_graph=True, allow_unused=True)

    def tangent(self, point: Point, dots: Values) -> Any:
        """J xdot, as the gradient of v -> <J^T v, xdot>."""
        kept: _Kept = point.kept[self.index]
        given = [slot for slot in kept.leaves if dots[slot] is not None]
        along = [dots[slot] for slot in given]
        if kept.pulled is None:
            found = kernel(self._jvp, kept.graph, given, along)
        else:
            found, kept.bends = kernel(self._along, kept.graph, kept.pulled, True, kept.leaves, given, along)
            kept.dots = along
        if all(dot is None for dot in found):
            return None
        return found[0] if kept.is_one else list(found)

    def _along(
        self,
        graph: Held,
        pulled: Held,
        of_results: bool,
        slots: Sequence[int],
        given: Sequence[int],
        dots: Sequence[Tensor],
    ) -> tuple[Sequence[Tensor | None], Sequence[Tensor | None]]:
        """J xdot where it is wanted, and the gradients of <J^T dy, xdot> to the inputs ``slots``."""
        pulls, along = _pairs(pulled.value, given, dots)
        has_graph = [isinstance(part, Tensor) and part.requires_grad for part in graph.value.parts]
        if not pulls:
            return [None] * len(has_graph), [None] * len(slots)
        seeds = pulled.value.seeds if of_results else []
        leaves = [graph.value.leaves[slot] for slot in slots]
        found = torch.autograd.grad(
            pulls,
            [*seeds, *leaves],
            along,
            retain_graph=True,
            allow_unused=True,
        )
        of_seeds = iter(found[: len(seeds)])
        return [next(of_seeds, None) if has else None for has in has_graph], found[len(seeds) :]

    def _jvp(self, graph: Held, slots: Sequence[int], dots: Sequence[Tensor]) -> Sequence[Tensor | None]:
        has_graph = [isinstance(part, Tensor) and part.requires_grad for part in graph.value.parts]
        outputs = [part for part, has in zip(graph.value.parts, has_graph, strict=True) if has]
        if not outputs:
            return [None] * len(has_graph)
        seeds = [torch.zeros_like(output, requires_grad=True) for output in outputs]
        pulled, along = _pulled(outputs, seeds, [graph.value.leaves[slot] for slot in slots], dots)
        found = iter(
            torch.autograd.grad(pulled, seeds, along, allow_unused=True) if pulled else [None] * len(seeds)
        )
        return [next(found) if has else None for has in has_graph]

    def adjoint(
        self, point: Point, dy_dot: Any, dy: Any, dots: Values, grads: Gradients, products: Products
    ) -> None:
        """As for any layer; where neither part has been computed, both are one gradient."""
        kept: _Kept = point.kept[self.index]
        given = [slot for slot in kept.leaves if dots[slot] is not None]
        along = [dots[slot] for slot in given]
        known = kept.bends is not None and _are_same(along, kept.dots)
        if dy_dot is None or dy is None or not given or known or not self._is_pulled(kept, dy):
            return super().adjoint(point, dy_dot, dy, dots, grads, products)
        places, cotangents = _by_place(dy_dot)
        found = kernel(self._both, kept.graph, kept.pulled, kept.leaves, places, cotangents, given, along)
        for slot, gradient in zip(kept.leaves, found, strict=True):
            grads.add(slot, gradient)

    def _both(
        self,
        graph: Held,
        pulled: Held,
        slots: Sequence[int],
        places: Sequence[int],
        dy_dot: Sequence[Tensor],
        given: Sequence[int],
        dots: Sequence[Tensor],
    ) -> Sequence[Tensor | None]:
        outputs, cotangents = _reached(graph.value, places, dy_dot)
        pulls, along = _pairs(pulled.value, given, dots)
        if not outputs and not pulls:
            return [None] * len(slots)
        return torch.autograd.grad(
            [*outputs, *pulls],
            [graph.value.leaves[slot] for slot in slots],
            [*cotangents, *along],
            retain_graph=True,
            allow_unused=True,
        )

    def _is_pulled(self, kept: _Kept, dy: Any) -> bool:
        """Whether the reverse that can be differentiated was of these cotangents."""
        places, cotangents = _by_place(dy)
        return kept.pulled is not None and _are_same(cotangents, [kept.dy.get(at) for at in places])

    def bend(self, point: Point, dy: Any, dots: Values, grads: Gradients, products: Products) -> None:
        """The gradient of <J^T dy, xdot>."""
        kept: _Kept = point.kept[self.index]
        given = [slot for slot in kept.leaves if dots[slot] is not None]
        if not given:
            return
        places, cotangents = _by_place(dy)
        along = [dots[slot] for slot in given]
        if not self._is_pulled(kept, dy):
            found = kernel(self._bent, kept.graph, kept.leaves, places, cotangents, given, along)
        elif kept.bends is not None and _are_same(along, kept.dots):
            found = kept.bends
        else:
            _, found = kernel(self._along, kept.graph, kept.pulled, False, kept.leaves, given, along)
        for slot, gradient in zip(kept.leaves, found, strict=True):
            grads.add(slot, gradient)

    def _bent(
        self,
        graph: Held,
        slots: Sequence[int],
        places: Sequence[int],
        dy: Sequence[Tensor],
        given: Sequence[int],
        dots: Sequence[Tensor],
    ) -> Sequence[Tensor | None]:
        outputs, cotangents = _reached(graph.value, places, dy)
        leaves = graph.value.leaves
        pulled, along = _pulled(outputs, cotangents, [leaves[slot] for slot in given], dots)
        if not pulled:
            return [None] * len(slots)
        wanted = [leaves[slot] for slot in slots]
        return torch.autograd.grad(pulled, wanted, along, retain_graph=True, allow_unused=True)


def _pairs(
    pulled: _Pulled, given: Sequence[int], dots: Sequence[Tensor]
) -> tuple[list[Tensor], list[Tensor]]:
    """Cotangents of inputs that have a graph, and what they are to be multiplied by."""
    pairs = [(pulled.found[slot], dot) for slot, dot in zip(given, dots, strict=True) if slot in pulled.found]
    return [pair[0] for pair in pairs], [pair[1] for pair in pairs]


def _is_continuous(value: Any) -> bool:
    return isinstance(value, Tensor) and (value.is_floating_point() or value.is_complex())


def _by_place(dy: Any) -> tuple[list[int], list[Tensor]]:
    """Cotangents of an operation's results, with their places."""
    return ([0], [dy]) if isinstance(dy, Tensor) else (list(dy), list(dy.values()))


def _are_same(these: Sequence[Any], those: Sequence[Any]) -> bool:
    return len(these) == len(those) and all(a is b for a, b in zip(these, those, strict=True))


def _reached(graph: _Graph, places: Sequence[int], dy: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """The results that depend on the leaves, and their cotangents."""
    pairs = [
        (graph.parts[at], gradient)
        for at, gradient in zip(places, dy, strict=True)
        if graph.parts[at].requires_grad
    ]
    return [pair[0] for pair in pairs], [pair[1] for pair in pairs]


def _pulled(
    outputs: Sequence[Tensor], cotangents: Sequence[Tensor], inputs: Sequence[Tensor], dots: Sequence[Tensor]
) -> tuple[list[Tensor], list[Tensor]]:
    """J^T v with its graph, where it has one, and what it is to be multiplied by."""
    if not outputs:
        return [], []
    found = torch.autograd.grad(
        list(outputs), list(inputs), list(cotangents), create_graph=True, allow_unused=True
    )
    pairs = [
        (pulled, dot)
        for pulled, dot in zip(found, dots, strict=True)
        if pulled is not None and pulled.requires_grad
    ]
    return [pair[0] for pair in pairs], [pair[1] for pair in pairs]
