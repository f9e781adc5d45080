"""Operations that move numbers and do not change them: views, permutations, slices, splits, copies, expansion.

All are linear; the reverse of each puts the numbers back. Dimensions are counted from behind, so that latents in front
change nothing.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastvae.network.program import Slot

from .base import Gradients, Layer, Point, Products, Values, layer_of

aten = torch.ops.aten


class ShapeLayer(Layer):
    """One active tensor to another, linear and without parameters: ``move`` and its reverse ``back``."""

    linear = of_complex = True
    keeps_inputs = keeps_output = False

    def __init__(self, operation: Any, active: Sequence[bool]) -> None:
        super().__init__(operation, active)
        self.is_plain = active[operation.slots[0]] and not any(active[slot] for slot in operation.slots[1:])

    def forward(self, point: Point) -> Any:
        """y; the shapes of both are kept."""
        x = point.values[self.x]
        y = self.operation.call(point.values)
        point.kept[self.index] = x.shape, y.shape if isinstance(y, Tensor) else None
        return y

    def shapes(
        self, point: Point, dot: Tensor, of_y: bool = False
    ) -> tuple[int | None, torch.Size, torch.Size]:
        """How many latents stand in front of a dot row, and the shapes of x and y."""
        x, y = point.kept[self.index]
        return (None if dot.dim() == len(y if of_y else x) else dot.shape[0]), x, y

    def move(self, dot: Tensor, latents: int | None, x: torch.Size, y: torch.Size) -> Tensor:
        """xdot to ydot."""
        raise NotImplementedError

    def back(self, dy: Tensor, latents: int | None, x: torch.Size, y: torch.Size) -> Tensor:
        """dy to dx."""
        raise NotImplementedError

    def reverse(self, point: Point, dy: Tensor, grads: Gradients, products: Products | None) -> None:
        """See above."""
        if grads.wants(self.x):
            grads.add(self.x, self.back(dy, *self.shapes(point, dy, of_y=True)))

    def tangent(self, point: Point, dots: Values) -> Any:
        """See above."""
        return self.move(dots[self.x], *self.shapes(point, dots[self.x]))


CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


def _front(latents: int | None, shape: Sequence[int]) -> list[int]:
    return list(shape) if latents is None else [latents, *shape]


def _register(*targets: Any) -> Callable[[type[ShapeLayer]], type[ShapeLayer]]:
    """Register a class whose layers take one active tensor and numbers."""

    def register(kind: type[ShapeLayer]) -> type[ShapeLayer]:
        @layer_of(*targets)
        def make(operation: Any, active: Sequence[bool]) -> Layer | None:
            first = operation.args[0]
            layer = kind(operation, active) if isinstance(first, Slot) and active[first.index] else None
            return layer if layer is not None and layer.is_plain else None

        return kind

    return register


@_register("view", "reshape", "_unsafe_view", "unsqueeze", "squeeze", "flatten", "unflatten", "clone", "contiguous",
           "alias", "lift_fresh_copy", "lift_fresh", "dropout", "view_copy", "_reshape_alias")  # fmt: skip
class Reshape(ShapeLayer):
    """The same numbers in the same order."""

    makes_images = False
    """Whether y, where it is an image, gets its channels last."""

    def forward(self, point: Point) -> Any:
        """y; with a copy where the layout that a layer of ours has put x in allows no view."""
        arguments = self.operation.arguments(point.values)
        if self.operation.kind in ("view", "_unsafe_view") and not isinstance(arguments[1], torch.dtype):
            x = point.values[self.x]
            y = x.reshape(arguments[1])
            point.kept[self.index] = x.shape, y.shape
        else:
            y = super().forward(point)
        return self._laid_out(y) if isinstance(y, Tensor) else y

    def _laid_out(self, y: Tensor) -> Tensor:
        layout = CHANNELS_LAST.get(y.dim()) if self.makes_images else None
        return y if layout is None else y.contiguous(memory_format=layout)

    def move(self, dot: Tensor, latents: int | None, x: torch.Size, y: torch.Size) -> Tensor:
        """See ``ShapeLayer``."""
        if not self.makes_images:
            return dot.reshape(_front(latents, y))
        rows = y[:1] if latents is None else (latents * y[0],)
        moved = self._laid_out(dot.reshape(*rows, *y[1:]))
        return moved if latents is None else moved.unflatten(0, (latents, -1))

    def back(self, dy: Tensor, latents: int | None, x: torch.Size, y: torch.Size) -> Tensor:
        """See ``ShapeLayer``."""
        return dy.reshape(_front(latents, x))


@_register("permute", "transpose", "t", "numpy_T", "mT", "swapaxes", "movedim")
class Permute(ShapeLayer):
    """Dimensions in another order."""

    def _order(self, rank: int) -> list[int]:
        args = self.operation.args[1:]
        # torch itself knows best which one comes where.
        probe = torch.empty(list(range(2, 2 + rank)), device="meta")
        return [size - 2 for size in self.operation.target(probe, *args).shape]

    def move(self, dot: Tensor, latents: int | None, x: torch.Size, y: torch.Size) -> Tensor:
        """See ``ShapeLayer``."""
        return self._permuted(dot, latents, self.order_of(len(x)))

    def back(self, dy: Tensor, latents: int | None, x: torch.Size, y: torch.Size) -> Tensor:
        """See ``ShapeLayer``."""
        order = self.order_of(len(x))
        inverse = [0] * len(order)
        for place, dim in enumerate(order):
            inverse[dim] = place
        return self._permuted(dy, latents, inverse)

    def order_of(self, rank: int) -> list[int]:
        """Which dimension of x is where in y."""
        if not hasattr(self, "_known"):
            self._known = self._order(rank)
        return self._known

    @staticmethod
    def _permuted(tensor: Tensor, latents: int | None, order: list[int]) -> Tensor:
        return tensor.permute(order if latents is None else [0, *(dim + 1 for dim in order)])


def _dim(dim: int, rank: int) -> int:
    """Counted from behind."""
    return dim if dim < 0 else dim - rank


@_register("slice", "narrow", "select")
class Part(ShapeLayer):
    """Some rows of one dimension, or one row of it."""

    def _apply(self, tensor: Tensor, rank: int) -> Tensor:
        _, *numbers = self.operation.args
        dim = _dim(numbers[0] if numbers else 0, rank)
        return self.operation.target(tensor, dim, *numbers[1:])

    def move(self, dot: Tensor, latents: int | None, x: torch.Size, y: torch.Size) -> Tensor:
        """See ``ShapeLayer``."""
        return self._apply(dot, len(x))

    def back(self, dy: Tensor, latents: int | None, x: torch.Size, y: torch.Size) -> Tensor:
        """See ``ShapeLayer``."""
        whole = dy.new_zeros(_front(latents, x))
        self._apply(whole, len(x)).copy_(dy)
        return whole


@_register("expand")
class Expand(ShapeLayer):
    """Dimensions of one number, repeated."""

    def move(self, dot: Tensor, latents: int | None, x: torch.Size, y: torch.Size) -> Tensor:
        """See ``ShapeLayer``."""
        padded = _front(latents, [1] * (len(y) - len(x)) + list(x))
        return dot.reshape(padded).expand(_front(latents, y))

    def back(self, dy: Tensor, latents: int | None, x: torch.Size, y: torch.Size) -> Tensor:
        """See ``ShapeLayer``."""
        padded = _front(latents, [1] * (len(y) - len(x)) + list(x))
        return dy.sum_to_size(padded).reshape(_front(latents, x))


@_register("repeat")
class Repeat(ShapeLayer):
    """Tiles."""

    def _times(self, x: torch.Size, y: torch.Size) -> list[int]:
        padded = [1] * (len(y) - len(x)) + list(x)
        return [after // max(before, 1) for before, after in zip(padded, y, strict=True)]

    def move(self, dot: Tensor, latents: int | None, x: torch.Size, y: torch.Size) -> Tensor:
        """See ``ShapeLayer``."""
        padded = _front(latents, [1] * (len(y) - len(x)) + list(x))
        return dot.reshape(padded).repeat(_front(None if latents is None else 1, self._times(x, y)))

    def back(self, dy: Tensor, latents: int | None, x: torch.Size, y: torch.Size) -> Tensor:
        """See ``ShapeLayer``."""
        padded = [1] * (len(y) - len(x)) + list(x)
        tiles = [size for pair in zip(self._times(x, y), padded, strict=True) for size in pair]
        by_tile = dy.reshape(_front(latents, tiles))
        return by_tile.sum([at - len(tiles) for at in range(0, len(tiles), 2)]).reshape(_front(latents, x))


@_register("mean", "sum")
class Total(ShapeLayer):
    """Sums and means over dimensions."""

    def _plan(self, x: torch.Size) -> tuple[list[int], float]:
        """The dimensions from behind, and what each number counts."""
        numbers = self.operation.args[1:]
        dims = (
            numbers[0] if numbers and isinstance(numbers[0], (list, tuple)) and numbers[0] else range(len(x))
        )
        chosen = [_dim(dim, len(x)) for dim in dims]
        count = 1
        for dim in chosen:
            count *= x[dim]
        return chosen, 1 / max(count, 1) if self.operation.kind == "mean" else 1.0

    def move(self, dot: Tensor, latents: int | None, x: torch.Size, y: torch.Size) -> Tensor:
        """See ``ShapeLayer``."""
        dims, weight = self._plan(x)
        total = dot.sum(dims).reshape(_front(latents, y))
        return total if weight == 1 else total * weight

    def back(self, dy: Tensor, latents: int | None, x: torch.Size, y: torch.Size) -> Tensor:
        """See ``ShapeLayer``."""
        dims, weight = self._plan(x)
        kept = [1 if at - len(x) in dims else size for at, size in enumerate(x)]
        each = dy if weight == 1 else dy * weight
        return each.reshape(_front(latents, kept)).expand(_front(latents, x))


@_register("to", "_to_copy")
class Cast(ShapeLayer):
    """The same numbers in another dtype."""

    of_complex = False

    def forward(self, point: Point) -> Any:
        """y; both dtypes are kept."""
        x = point.values[self.x]
        y = self.operation.call(point.values)
        point.kept[self.index] = x.dtype, y.dtype
        return y

    stops = True

    def reverse(self, point: Point, dy: Tensor, grads: Gradients, products: Products | None) -> None:
        """dy in the dtype of x; nothing to what is no floating number."""
        dtype, _ = point.kept[self.index]
        if grads.wants(self.x) and dtype.is_floating_point:
            grads.add(self.x, dy.to(dtype))

    def tangent(self, point: Point, dots: Values) -> Any:
        """xdot in the dtype of y."""
        _, dtype = point.kept[self.index]
        return dots[self.x].to(dtype) if dtype.is_floating_point else None


@_register("split", "split_with_sizes", "chunk", "unbind")
class Split(ShapeLayer):
    """One tensor in parts along a dimension."""

    def _dimension(self, rank: int) -> int:
        numbers = self.operation.args[1:]
        place = 0 if self.operation.kind == "unbind" else 1
        return _dim(numbers[place] if len(numbers) > place else 0, rank)

    def tangent(self, point: Point, dots: Values) -> Any:
        """The same parts of xdot."""
        dot, (x, _) = dots[self.x], point.kept[self.index]
        numbers, dim = list(self.operation.arguments(point.values)[1:]), self._dimension(len(x))
        sizes = [] if self.operation.kind == "unbind" else numbers[:1]
        return list(self.operation.target(dot, *sizes, dim))

    def reverse(self, point: Point, dy: Any, grads: Gradients, products: Products | None) -> None:
        """The parts side by side; of those without a cotangent, zeros."""
        if not grads.wants(self.x):
            return
        (x, _), dim = point.kept[self.index], self._dimension(len(point.kept[self.index][0]))
        known = next(iter(dy.values()))
        rank = len(x) - (self.operation.kind == "unbind")
        latents = None if known.dim() == rank else known.shape[0]
        whole = known.new_zeros(_front(latents, x))
        numbers = list(self.operation.arguments(point.values)[1:])
        sizes = [] if self.operation.kind == "unbind" else numbers[:1]
        for part, gradient in dy.items():
            self.operation.target(whole, *sizes, dim)[part].copy_(gradient)
        grads.add(self.x, whole)


class Item(Layer):
    """One result of an operation that has several."""

    linear = True
    keeps_inputs = keeps_output = False

    def reverse(self, point: Point, dy: Tensor, grads: Gradients, products: Products | None) -> None:
        """dy, in its place."""
        grads.add_part(self.x, self.operation.args[1], dy)

    def tangent(self, point: Point, dots: Values) -> Any:
        """The part of the tangents."""
        return dots[self.x][self.operation.args[1]]


@layer_of(operator.getitem)
def item(operation: Any, active: Sequence[bool]) -> Layer:
    """getitem(results, place)."""
    return Item(operation, active)
