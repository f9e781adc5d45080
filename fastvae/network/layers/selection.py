"""Operations that choose or count: what has no derivative, look-ups in a table, masks, and PReLU.

A value that reaches the output through such an operation alone is only computed, and nothing of it comes back.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastvae.network.program import Slot

from .base import Gradients, Layer, Point, Products, Values, layer_of, over_latents
from .shapes import ShapeLayer


class ForwardLayer(Layer):
    """An operation whose result is looked at and not differentiated."""

    linear = True
    keeps_inputs = keeps_output = False
    stops = True

    def reverse(self, point: Point, dy: Any, grads: Gradients, products: Products | None) -> None:
        """Nothing."""

    def tangent(self, point: Point, dots: Values) -> None:
        """None: zero."""


@layer_of(
    "argmin", "argmax", "eq", "ne", "lt", "le", "gt", "ge", "isfinite", "isnan", "isinf", "logical_not", "logical_and",
    "logical_or", "sign", "round", "floor", "ceil", "trunc", "zeros_like", "ones_like", "full_like", "empty_like",
    "new_zeros", "new_ones", "new_full", "new_empty", "one_hot", "argsort", "floor_divide", "bitwise_not",
    "bitwise_and", "bitwise_or", "heaviside", "nonzero", "searchsorted", "bucketize",
)  # fmt: skip
def without_derivative(operation: Any, active: Sequence[bool]) -> Layer:
    """Comparisons, counts, roundings, and tensors of which the shape alone is another's."""
    return ForwardLayer(operation, active)


class Lookup(ForwardLayer):
    """Rows of a passive table, by numbers that depend on z: dtable = the rows of dy added up by number."""

    keeps_inputs = True
    stops = True

    def __init__(self, operation: Any, active: Sequence[bool]) -> None:
        super().__init__(operation, active)
        self.table, self.numbers = operation.args[0].index, operation.args[1].index

    def reverse(self, point: Point, dy: Tensor, grads: Gradients, products: Products | None) -> None:
        """See above."""
        if products is not None and grads.wants(self.table):
            numbers = point.values[self.numbers].flatten()
            found = torch.zeros_like(point.values[self.table])
            grads.add(self.table, found.index_add_(0, numbers, dy.reshape(len(numbers), -1)))


@layer_of("embedding")
def embedding(operation: Any, active: Sequence[bool]) -> Layer | None:
    """aten.embedding(table, numbers, padding_idx=-1, ...)."""
    table, _, *rest = operation.args
    if active[table.index] or any(rest[1:]) or (rest and rest[0] not in (-1,)):
        return None
    return Lookup(operation, active)


class MaskedFill(ShapeLayer):
    """x, and a number where a mask is set: dx = dy outside of the mask."""

    keeps_inputs = True

    def _masked(self, point: Point, dot: Tensor) -> Tensor:
        mask = point.values[self.operation.args[1].index]
        return dot.masked_fill(mask, 0)

    def reverse(self, point: Point, dy: Tensor, grads: Gradients, products: Products | None) -> None:
        """See above."""
        if grads.wants(self.x):
            latents, x, _ = self.shapes(point, dy, of_y=True)
            masked = self._masked(point, dy)
            front = [] if latents is None else [latents]
            grads.add(self.x, masked if masked.shape == dy.shape and x == dy.shape[len(front) :] else
                      masked.sum_to_size(*front, *x))  # fmt: skip

    def tangent(self, point: Point, dots: Values) -> Tensor:
        """See above."""
        return self._masked(point, dots[self.x])


@layer_of("masked_fill")
def masked_fill(operation: Any, active: Sequence[bool]) -> Layer | None:
    """aten.masked_fill(x, mask, number)."""
    x, mask, value = operation.args
    if not active[x.index] or isinstance(value, Slot) or not isinstance(mask, Slot):
        return None
    return MaskedFill(operation, active)


class PReLU(Layer):
    """y = x where x > 0, and w x elsewhere, w passive and one number or one a channel.

    dx = dy (1 or w), dw = dy x where x <= 0; the second-order term is dw = dy xdot there.
    """

    keeps_output = False

    def __init__(self, operation: Any, active: Sequence[bool]) -> None:
        super().__init__(operation, active)
        self.weight = operation.args[1].index

    def _broadcast(self, point: Point) -> Tensor:
        weight, x = point.values[self.weight], point.values[self.x]
        return weight.reshape(-1, *[1] * (x.dim() - 2)) if x.dim() > 1 else weight

    def _times_slope(self, point: Point, v: Tensor) -> Tensor:
        return torch.where(point.values[self.x] > 0, v, v * self._broadcast(point))

    def _add_weight(self, point: Point, grads: Gradients, dy: Tensor, factor: Tensor) -> None:
        x = point.values[self.x]
        below = (dy * factor).masked_fill(x > 0, 0)
        summed = over_latents(below, x.dim()).sum_to_size(self._broadcast(point).shape)
        grads.add(self.weight, summed.reshape(point.values[self.weight].shape))

    def reverse(self, point: Point, dy: Tensor, grads: Gradients, products: Products | None) -> None:
        """See above."""
        if grads.wants(self.x):
            grads.add(self.x, self._times_slope(point, dy))
        if products is not None and grads.wants(self.weight):
            self._add_weight(point, grads, dy, point.values[self.x])

    def tangent(self, point: Point, dots: Values) -> Tensor:
        """See above."""
        return self._times_slope(point, dots[self.x])

    def bend(self, point: Point, dy: Tensor, dots: Values, grads: Gradients, products: Products) -> None:
        """See above."""
        if dots[self.x] is not None and grads.wants(self.weight):
            self._add_weight(point, grads, dy, dots[self.x])


@layer_of("prelu", "_prelu_kernel")
def prelu(operation: Any, active: Sequence[bool]) -> Layer | None:
    """aten.prelu(x, weight)."""
    x, weight = operation.args
    return PReLU(operation, active) if active[x.index] and not active[weight.index] else None


def without_cotangents(layers: Sequence[Layer], output: int) -> list[Layer]:
    """Layers whose results reach the output through others that stop: they are only computed."""
    differentiated = {output}
    for layer in reversed(layers):
        if layer.index in differentiated and not layer.stops:
            differentiated.update(layer.slots)
    return [
        layer if layer.index in differentiated or layer.stops else ForwardLayer(layer.operation, layer.active)
        for layer in layers
    ]
