"""What does not change with z, such as comparisons and zeros; and choices between values by it.

All are linear as long as the choice stays: y = a where m holds, else b.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastvae.network.program import Slot

from .base import Gradients, Layer, Point, Products, Values, layer_of
from .joins import back, raised


class Constant(Layer):
    """The value goes on, and nothing of it comes back."""

    linear = True
    keeps_inputs = keeps_output = False
    stops = True

    def reverse(self, point: Point, dy: Any, grads: Gradients, products: Products | None) -> None:
        """Nothing."""

    def tangent(self, point: Point, dots: Values) -> None:
        """None: zero."""


@layer_of(
    "detach", "eq", "ne", "lt", "le", "gt", "ge", "logical_and", "logical_or", "logical_not", "logical_xor",
    "bitwise_and", "bitwise_or", "bitwise_not", "__and__", "__or__", "__xor__", "isnan", "isinf", "isfinite", "sign",
    "floor", "ceil", "round", "trunc", "argmax", "argmin", "zeros_like", "ones_like", "full_like", "new_zeros",
    "new_ones", "new_full",
)  # fmt: skip
def constant(operation: Any, active: Sequence[bool]) -> Layer:
    """Any arguments."""
    return Constant(operation, active)


class Choice(Layer):
    """y = a where the mask holds, else b; each a value, passive or not, or a number."""

    linear = True
    keeps_inputs = keeps_output = False

    def __init__(self, operation: Any, active: Sequence[bool], mask: int, a: Any, b: Any) -> None:
        super().__init__(operation, active)
        self.mask, self.active = mask, active
        self.terms = [
            (part.index, holds) for part, holds in ((a, True), (b, False)) if isinstance(part, Slot)
        ]

    def forward(self, point: Point) -> Tensor:
        """y; the mask is kept, and the shapes as tensors without numbers."""
        y = self.operation.call(point.values)
        shapes = [torch.empty(point.values[index].shape, device="meta") for index, _ in self.terms]
        point.kept[self.index] = point.values[self.mask], shapes, y.shape
        return y

    def reverse(self, point: Point, dy: Tensor, grads: Gradients, products: Products | None) -> None:
        """dy to each where it was chosen."""
        mask, shapes, y = point.kept[self.index]
        for (index, holds), like in zip(self.terms, shapes, strict=True):
            if grads.wants(index) and (products is not None or self.active[index]):
                grads.add(index, back(dy.masked_fill(~mask if holds else mask, 0.0), like, len(y)))

    def tangent(self, point: Point, dots: Values) -> Tensor | None:
        """The tangents of what was chosen."""
        mask, shapes, y = point.kept[self.index]
        total: Tensor | None = None
        for (index, holds), like in zip(self.terms, shapes, strict=True):
            if dots[index] is not None:
                dot = raised(dots[index], like, len(y))
                dot = dot.expand(*dot.shape[: dot.dim() - len(y)], *y).masked_fill(
                    ~mask if holds else mask, 0.0
                )
                total = dot if total is None else total + dot
        return total


@layer_of("where")
def choice(operation: Any, active: Sequence[bool]) -> Layer | None:
    """aten.where(mask, a, b)."""
    if len(operation.args) != 3 or operation.kwargs:
        return None
    mask, a, b = operation.args
    return None if operation.numbers else Choice(operation, active, mask.index, a, b)


@layer_of("masked_fill")
def masked_fill(operation: Any, active: Sequence[bool]) -> Layer | None:
    """aten.masked_fill(x, mask, number)."""
    x, mask, value = operation.args
    return None if isinstance(value, Slot) else Choice(operation, active, mask.index, value, x)


def without_cotangents(layers: Sequence[Layer], output: int) -> list[Layer]:
    """Layers whose results reach the output through others that stop: they are only computed."""
    differentiated = {output}
    for layer in reversed(layers):
        if layer.index in differentiated and not layer.stops:
            differentiated.update(layer.slots)
    return [
        layer if layer.index in differentiated or layer.stops else Constant(layer.operation, layer.active)
        for layer in layers
    ]
