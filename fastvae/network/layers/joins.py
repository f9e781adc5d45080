"""Operations on two tensors or more: sums, products, concatenation, matrix products.

Sums and concatenation are linear. Of a product y = a b the second-order term is da = dy bdot, db = dy adot.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastvae.network.program import Slot

from .base import Gradients, Layer, Point, Products, Values, layer_of, over_latents, reduced


def _raised(dot: Tensor, like: Tensor, rank: int) -> Tensor:
    """A dot row of a value that is broadcast to ``rank`` dimensions: those come behind the latents."""
    missing = rank - like.dim()
    if dot.dim() == like.dim() or missing == 0:
        return dot
    return dot.reshape(dot.shape[0], *[1] * missing, *like.shape)


def _back(gradient: Tensor, like: Tensor, rank: int) -> Tensor:
    """The cotangent of a dot row, summed to where the value was broadcast from."""
    if gradient.dim() == rank:
        return reduced(gradient, like.shape)
    front = gradient.shape[0]
    padded = [front, *[1] * (rank - like.dim()), *like.shape]
    return reduced(gradient, padded).reshape(front, *like.shape)


class SumLayer(Layer):
    """a + factor b; of which one may be passive, or a number."""

    linear = True
    keeps_output = False
    # Only shapes are looked at, which are taken in the forward sweep.
    keeps_inputs = False

    def __init__(self, operation: Any, active: Sequence[bool], factors: tuple[float, float]) -> None:
        super().__init__(operation, active)
        terms = zip(operation.args[:2], factors, strict=True)
        self.terms = [(term.index, factor) for term, factor in terms if isinstance(term, Slot)]
        self.active = active

    def forward(self, point: Point) -> Tensor:
        """y; the shapes of the terms are kept, as tensors without numbers."""
        y = self.operation.call(point.values)
        point.kept[self.index] = [_shape_of(point.values[index]) for index, _ in self.terms], y.shape
        return y

    def reverse(self, point: Point, dy: Tensor, grads: Gradients, products: Products | None) -> None:
        """dy to each term."""
        shapes, y = point.kept[self.index]
        for (index, factor), like in zip(self.terms, shapes, strict=True):
            if (
                isinstance(like, Tensor)
                and grads.wants(index)
                and (products is not None or self.active[index])
            ):
                grads.add(index, _back(dy if factor == 1 else dy * factor, like, len(y)))

    def tangent(self, point: Point, dots: Values) -> Tensor | None:
        """The sum of what is not zero, in the shape of y."""
        shapes, y = point.kept[self.index]
        total: Tensor | None = None
        for (index, factor), like in zip(self.terms, shapes, strict=True):
            if dots[index] is not None:
                dot = _raised(dots[index], like, len(y))
                dot = dot if factor == 1 else dot * factor
                total = dot if total is None else total + dot
        if total is None:
            return None
        front = total.shape[: total.dim() - len(y)]
        return total if total.shape[len(front) :] == y else total.expand(*front, *y)


def _shape_of(value: Any) -> Any:
    return torch.empty(value.shape, device="meta") if isinstance(value, Tensor) else None


@layer_of("add", "sub", "rsub")
def total(operation: Any, active: Sequence[bool]) -> Layer | None:
    """aten.add(a, b, alpha=1) and its like."""
    alpha = operation.kwargs.get("alpha", operation.args[2] if len(operation.args) > 2 else 1)
    if set(operation.kwargs) - {"alpha"} or not isinstance(alpha, (int, float)):
        return None
    factors = {"add": (1, alpha), "sub": (1, -alpha), "rsub": (-alpha, 1)}[operation.kind]
    return SumLayer(operation, active, factors)


class ProductLayer(Layer):
    """y = a b, element by element with broadcasting, or a matrix product; one of the two may be passive."""

    keeps_output = False

    def __init__(
        self,
        operation: Any,
        active: Sequence[bool],
        multiply: Callable[[Tensor, Tensor], Tensor],
        to_a: Callable[[Tensor, Tensor], Tensor],
        to_b: Callable[[Tensor, Tensor], Tensor],
        ranks_follow: bool,
    ) -> None:
        super().__init__(operation, active)
        self.a, self.b = (arg.index for arg in operation.args[:2])
        self.multiply, self.to_a, self.to_b, self.ranks_follow = multiply, to_a, to_b, ranks_follow
        self.active = active
        self.linear = False

    def _rank(self, point: Point) -> int:
        return max(point.values[self.a].dim(), point.values[self.b].dim())

    def reverse(self, point: Point, dy: Tensor, grads: Gradients, products: Products | None) -> None:
        """da = dy b, db = a dy."""
        a, b, rank = point.values[self.a], point.values[self.b], self._rank(point)
        for index, like, gradient in (
            (self.a, a, lambda: self.to_a(dy, b)),
            (self.b, b, lambda: self.to_b(a, dy)),
        ):
            if grads.wants(index) and (products is not None or self.active[index]):
                grads.add(index, _back(gradient(), like, rank))

    def tangent(self, point: Point, dots: Values) -> Tensor | None:
        """adot b + a bdot."""
        a, b, rank = point.values[self.a], point.values[self.b], self._rank(point)
        parts = []
        if dots[self.a] is not None:
            parts.append(self.multiply(_raised(dots[self.a], a, rank), b))
        if dots[self.b] is not None:
            parts.append(self.multiply(a, _raised(dots[self.b], b, rank)))
        return None if not parts else parts[0] if len(parts) == 1 else parts[0] + parts[1]

    def bend(self, point: Point, dy: Tensor, dots: Values, grads: Gradients, products: Products) -> None:
        """da = dy bdot, db = adot dy."""
        a, b, rank = point.values[self.a], point.values[self.b], self._rank(point)
        if dots[self.b] is not None and grads.wants(self.a):
            gradient = self.to_a(dy, _raised(dots[self.b], b, rank))
            grads.add(self.a, over_latents(_back(gradient, a, rank), a.dim()))
        if dots[self.a] is not None and grads.wants(self.b):
            gradient = self.to_b(_raised(dots[self.a], a, rank), dy)
            grads.add(self.b, over_latents(_back(gradient, b, rank), b.dim()))


def _are_tensors(operation: Any) -> bool:
    first = operation.args[:2]
    return len(first) == 2 and all(isinstance(arg, Slot) for arg in first) and not operation.kwargs


@layer_of("mul")
def product(operation: Any, active: Sequence[bool]) -> Layer | None:
    """aten.mul(a, b)."""
    a, b = operation.args
    if isinstance(a, Slot) and isinstance(b, (int, float)):
        return ScaleLayer(operation, active, float(b))
    if not _are_tensors(operation):
        return None
    return ProductLayer(operation, active, torch.mul, torch.mul, torch.mul, True)


class ScaleLayer(Layer):
    """y = c x for a number c."""

    linear = True
    keeps_inputs = keeps_output = False

    def __init__(self, operation: Any, active: Sequence[bool], factor: float) -> None:
        super().__init__(operation, active)
        self.factor = factor

    def reverse(self, point: Point, dy: Tensor, grads: Gradients, products: Products | None) -> None:
        """c dy."""
        if grads.wants(self.x):
            grads.add(self.x, dy * self.factor)

    def tangent(self, point: Point, dots: Values) -> Tensor:
        """c xdot."""
        return dots[self.x] * self.factor


@layer_of("div")
def quotient(operation: Any, active: Sequence[bool]) -> Layer | None:
    """aten.div(a, number); of two tensors it is left to autograd."""
    if operation.kwargs or len(operation.args) != 2:
        return None
    a, b = operation.args
    if isinstance(a, Slot) and isinstance(b, (int, float)) and b != 0:
        return ScaleLayer(operation, active, 1 / b)
    return None


@layer_of("mm", "bmm", "matmul")
def matrix_product(operation: Any, active: Sequence[bool]) -> Layer | None:
    """aten.matmul(a, b) of matrices or batches of them."""
    if not _are_tensors(operation):
        return None
    return MatrixProduct(operation, active)


class MatrixProduct(ProductLayer):
    """y = a b; vectors are left to autograd, which is found out at the first use."""

    def __init__(self, operation: Any, active: Sequence[bool]) -> None:
        super().__init__(
            operation, active, torch.matmul, lambda dy, b: dy @ b.mT, lambda a, dy: a.mT @ dy, False
        )

    def forward(self, point: Point) -> Tensor:
        """y."""
        a, b = point.values[self.a], point.values[self.b]
        if a.dim() < 2 or b.dim() < 2:
            raise NotImplementedError("a matrix product with a vector")
        return super().forward(point)


class Concatenation(Layer):
    """Tensors side by side along a dimension, passive ones among them."""

    linear = True
    keeps_inputs = keeps_output = False

    def __init__(self, operation: Any, active: Sequence[bool], dim: int, new: bool) -> None:
        super().__init__(operation, active)
        self.parts = [part.index for part in operation.args[0]]
        self.dim, self.new, self.active = dim, new, active

    def forward(self, point: Point) -> Tensor:
        """y; the shapes of the parts are kept."""
        parts = [point.values[index] for index in self.parts]
        y = self.operation.call(point.values)
        dim = self.dim if self.dim < 0 else self.dim - y.dim()
        shapes = [part.shape for part in parts]
        point.kept[self.index] = shapes, [1 if self.new else shape[dim] for shape in shapes], dim
        return y

    def reverse(self, point: Point, dy: Tensor, grads: Gradients, products: Products | None) -> None:
        """Each part's piece of dy."""
        _, sizes, dim = point.kept[self.index]
        for index, piece in zip(self.parts, dy.split(sizes, dim), strict=True):
            if grads.wants(index) and (products is not None or self.active[index]):
                grads.add(index, piece.squeeze(dim) if self.new else piece)

    def tangent(self, point: Point, dots: Values) -> Tensor:
        """The tangents side by side, zeros where there is none."""
        shapes, _, dim = point.kept[self.index]
        pairs = list(zip((dots[index] for index in self.parts), shapes, strict=True))
        known, like = next((dot, shape) for dot, shape in pairs if dot is not None)
        front = known.shape[: known.dim() - len(like)]
        parts = [known.new_zeros(*front, *shape) if dot is None else dot for dot, shape in pairs]
        return torch.stack(parts, dim) if self.new else torch.cat(parts, dim)


@layer_of("cat", "concat", "stack")
def concatenation(operation: Any, active: Sequence[bool]) -> Layer | None:
    """aten.cat(tensors, dim=0) and aten.stack(tensors, dim=0)."""
    parts, *rest = operation.args
    dim = rest[0] if rest else operation.kwargs.get("dim", 0)
    if not all(isinstance(part, Slot) for part in parts):
        return None
    return Concatenation(operation, active, dim, operation.kind == "stack")
