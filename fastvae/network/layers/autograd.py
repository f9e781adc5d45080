"""An operation that no rule knows: its rules are autograd's, on that operation alone.

reverse is one vector-Jacobian product with its graph; tangent and bend are gradients of it, which is right where
PyTorch's derivatives of forward mode are not.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .base import Gradients, Layer, Point, Products, Values


class AutogradLayer(Layer):
    """One operation through PyTorch's autograd."""

    many = False
    by_autograd = True
    keeps_output = False
    keeps_inputs = False

    def __init__(self, operation: Any, active: Sequence[bool]) -> None:
        super().__init__(operation, active)
        self.is_active = {slot: active[slot] for slot in self.slots}

    def forward(self, point: Point) -> Any:
        """y, with a graph of its own from the inputs that need one."""
        values = list(point.values)
        leaves: dict[int, Tensor] = {}
        for slot in self.slots:
            value = values[slot]
            if isinstance(value, Tensor) and point.wanted[slot] and value.is_floating_point():
                leaves[slot] = values[slot] = value.detach().requires_grad_()
        with torch.enable_grad():
            y = self.operation.call(values)
        point.kept[self.index] = leaves, y
        if isinstance(y, Tensor):
            return y.detach()
        return type(y)(part.detach() if isinstance(part, Tensor) else part for part in y)

    def reverse(self, point: Point, dy: Any, grads: Gradients, products: Products | None) -> None:
        """One vector-Jacobian product."""
        leaves, outputs, cotangents = self._outputs(point, dy)
        slots = [slot for slot in leaves if products is not None or self.is_active[slot]]
        if not outputs or not slots:
            return
        found = torch.autograd.grad(
            outputs, [leaves[slot] for slot in slots], cotangents, retain_graph=True, allow_unused=True
        )
        for slot, gradient in zip(slots, found, strict=True):
            grads.add(slot, gradient)

    def tangent(self, point: Point, dots: Values) -> Any:
        """J xdot, as the gradient of v -> <J^T v, xdot>."""
        leaves, y = point.kept[self.index]
        parts = [y] if isinstance(y, Tensor) else list(y)
        outputs = [part for part in parts if isinstance(part, Tensor) and part.requires_grad]
        given = [slot for slot in leaves if dots[slot] is not None]
        seeds = [torch.zeros_like(output, requires_grad=True) for output in outputs]
        if not outputs:
            return None
        pulled, along = self._pulled(
            outputs, seeds, [leaves[slot] for slot in given], [dots[slot] for slot in given]
        )
        found = (
            torch.autograd.grad(pulled, seeds, along, allow_unused=True) if pulled else [None] * len(seeds)
        )
        if isinstance(y, Tensor):
            return found[0]
        each = iter(found)
        return [next(each) if isinstance(part, Tensor) and part.requires_grad else None for part in parts]

    def bend(self, point: Point, dy: Any, dots: Values, grads: Gradients, products: Products) -> None:
        """The gradient of <J^T dy, xdot>."""
        leaves, outputs, cotangents = self._outputs(point, dy)
        given = [slot for slot in leaves if dots[slot] is not None]
        if not outputs or not given:
            return
        pulled, along = self._pulled(
            outputs, cotangents, [leaves[slot] for slot in given], [dots[slot] for slot in given]
        )
        if not pulled:
            return
        slots = list(leaves)
        found = torch.autograd.grad(
            pulled, [leaves[slot] for slot in slots], along, retain_graph=True, allow_unused=True
        )
        for slot, gradient in zip(slots, found, strict=True):
            grads.add(slot, gradient)

    def _outputs(self, point: Point, dy: Any) -> tuple[dict[int, Tensor], list[Tensor], list[Tensor]]:
        """The leaves, and the outputs with their cotangents, where there is one and it reaches the leaves."""
        leaves, y = point.kept[self.index]
        given = {0: dy} if isinstance(y, Tensor) else dy
        parts = [y] if isinstance(y, Tensor) else y
        pairs = [(parts[at], gradient) for at, gradient in given.items() if parts[at].requires_grad]
        return leaves, [pair[0] for pair in pairs], [pair[1] for pair in pairs]

    @staticmethod
    def _pulled(
        outputs: Sequence[Tensor],
        cotangents: Sequence[Tensor],
        inputs: Sequence[Tensor],
        dots: Sequence[Tensor],
    ) -> tuple[list[Tensor], list[Tensor]]:
        """J^T v with its graph, where it has one, and what it is to be multiplied by."""
        found = torch.autograd.grad(
            list(outputs), list(inputs), list(cotangents), create_graph=True, allow_unused=True
        )
        pairs = [
            (pulled, dot)
            for pulled, dot in zip(found, dots, strict=True)
            if pulled is not None and pulled.requires_grad
        ]
        return [pair[0] for pair in pairs], [pair[1] for pair in pairs]
