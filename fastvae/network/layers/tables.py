"""Look-ups in a table, gathered elements, and PReLU: what is chosen from a tensor of the network, or by one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .base import Gradients, Layer, Point, Products, Values, layer_of, over_latents
from .choices import Constant


class Lookup(Constant):
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


class Gather(Layer):
    """Elements of x along a dimension, by whole numbers: y_i = x_{n_i}, and dx the sums of dy by number."""

    linear = True
    keeps_inputs = keeps_output = False

    def __init__(self, operation: Any, active: Sequence[bool]) -> None:
        super().__init__(operation, active)
        self.x, self.dim, self.numbers = operation.args[0].index, operation.args[1], operation.args[2].index

    def forward(self, point: Point) -> Any:
        """y; the numbers are kept, and the shape of x."""
        point.kept[self.index] = point.values[self.numbers], point.values[self.x].shape
        return super().forward(point)

    def _of_latents(self, point: Point, dot: Tensor) -> tuple[int, Tensor]:
        """The dimension from behind, and the numbers for each latent."""
        numbers, shape = point.kept[self.index]
        dim = self.dim if self.dim < 0 else self.dim - len(shape)
        return dim, numbers if dot.dim() == len(shape) else numbers.expand(len(dot), *numbers.shape)

    def reverse(self, point: Point, dy: Tensor, grads: Gradients, products: Products | None) -> None:
        """See above."""
        if grads.wants(self.x):
            _, shape = point.kept[self.index]
            dim, numbers = self._of_latents(point, dy)
            front = dy.shape[: dy.dim() - len(shape)]
            grads.add(self.x, dy.new_zeros(*front, *shape).scatter_add(dim, numbers, dy))

    def tangent(self, point: Point, dots: Values) -> Tensor | None:
        """See above."""
        if dots[self.x] is None:
            return None
        dim, numbers = self._of_latents(point, dots[self.x])
        return dots[self.x].gather(dim, numbers)


@layer_of("gather")
def gather(operation: Any, active: Sequence[bool]) -> Layer | None:
    """aten.gather(x, dim, numbers)."""
    return Gather(operation, active) if active[operation.args[0].index] else None


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


@layer_of("prelu")
def prelu(operation: Any, active: Sequence[bool]) -> Layer | None:
    """aten.prelu(x, weight)."""
    x, weight = operation.args
    return PReLU(operation, active) if active[x.index] and not active[weight.index] else None
