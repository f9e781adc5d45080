"""Operations on two tensors or more: sums, products, concatenation, matrix products.

Sums and concatenation are linear. Of a product y = a b the second-order term is da = dy bdot, db = dy adot.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastvae.lowering.errors import UnsupportedLayer
from fastvae.network.program import Slot

from .base import Gradients, Layer, Point, Products, Values, layer_of, over_latents, reduced


def raised(dot: Tensor, like: Tensor, rank: int) -> Tensor:
    """A dot row of a value that is broadcast to ``rank`` dimensions: those come behind the latents."""
    missing = rank - like.dim()
    if missing == 0:
        return dot
    front = dot.shape[: dot.dim() - like.dim()]
    return dot.reshape(*front, *[1] * missing, *like.shape)


def back(gradient: Tensor, like: Tensor, rank: int) -> Tensor:
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
                grads.add(index, back(dy if factor == 1 else dy * factor, like, len(y)))

    def tangent(self, point: Point, dots: Values) -> Tensor | None:
        """The sum of what is not zero, in the shape of y."""
        shapes, y = point.kept[self.index]
        total: Tensor | None = None
        for (index, factor), like in zip(self.terms, shapes, strict=True):
            if dots[index] is not None:
                dot = raised(dots[index], like, len(y))
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
    ) -> None:
        super().__init__(operation, active)
        self.a, self.b = (arg.index for arg in operation.args[:2])
        self.multiply, self.to_a, self.to_b, self.active = multiply, to_a, to_b, active

    def factors(self, point: Point) -> tuple[Tensor, Tensor]:
        """a and b."""
        return point.values[self.a], point.values[self.b]

    def reverse(self, point: Point, dy: Tensor, grads: Gradients, products: Products | None) -> None:
        """da = dy b, db = a dy."""
        a, b = self.factors(point)
        rank = max(a.dim(), b.dim())
        for index, like, gradient in (
            (self.a, a, lambda: self.to_a(dy, b)),
            (self.b, b, lambda: self.to_b(a, dy)),
        ):
            if grads.wants(index) and (products is not None or self.active[index]):
                self._add(point, grads, index, back(gradient(), like, rank))

    def _add(self, point: Point, grads: Gradients, index: int, gradient: Tensor) -> None:
        """Add a gradient to a value; to a passive one in its own shape, which may be a vector's and not a matrix's."""
        grads.add(index, gradient if self.active[index] else gradient.reshape(point.values[index].shape))

    def tangent(self, point: Point, dots: Values) -> Tensor | None:
        """adot b + a bdot."""
        a, b = self.factors(point)
        rank = max(a.dim(), b.dim())
        parts = []
        if dots[self.a] is not None:
            parts.append(self.multiply(raised(dots[self.a], a, rank), b))
        if dots[self.b] is not None:
            parts.append(self.multiply(a, raised(dots[self.b], b, rank)))
        return None if not parts else parts[0] if len(parts) == 1 else parts[0] + parts[1]

    def bend(self, point: Point, dy: Tensor, dots: Values, grads: Gradients, products: Products) -> None:
        """da = dy bdot, db = adot dy."""
        a, b = self.factors(point)
        rank = max(a.dim(), b.dim())
        if dots[self.b] is not None and grads.wants(self.a):
            gradient = self.to_a(dy, raised(dots[self.b], b, rank))
            self._add(point, grads, self.a, over_latents(back(gradient, a, rank), a.dim()))
        if dots[self.a] is not None and grads.wants(self.b):
            gradient = self.to_b(raised(dots[self.a], a, rank), dy)
            self._add(point, grads, self.b, over_latents(back(gradient, b, rank), b.dim()))


def _are_tensors(operation: Any) -> bool:
    first = operation.args[:2]
    tensors = all(isinstance(arg, Slot) and arg.index not in operation.numbers for arg in first)
    return len(first) == 2 and tensors and not operation.kwargs


@layer_of("mul")
def product(operation: Any, active: Sequence[bool]) -> Layer | None:
    """aten.mul(a, b)."""
    a, b = operation.args
    if isinstance(a, Slot) and isinstance(b, (int, float)):
        return ScaleLayer(operation, active, float(b))
    if not _are_tensors(operation):
        return None
    return ProductLayer(operation, active, torch.mul, torch.mul, torch.mul)


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


class QuotientLayer(ProductLayer):
    """y = a / b, element by element: da = dy / b, db = -dy y / b; ydot = (adot - y bdot) / b.

    The second-order term: da = -dy bdot / b^2, db = -dy (adot - 2 y bdot) / b^2.
    """

    def __init__(self, operation: Any, active: Sequence[bool]) -> None:
        super().__init__(operation, active, torch.div, torch.div, torch.mul)

    def reverse(self, point: Point, dy: Tensor, grads: Gradients, products: Products | None) -> None:
        """See above."""
        a, b = self.factors(point)
        rank, each = max(a.dim(), b.dim()), dy / b
        if grads.wants(self.a) and (products is not None or self.active[self.a]):
            grads.add(self.a, back(each, a, rank))
        if grads.wants(self.b) and (products is not None or self.active[self.b]):
            grads.add(self.b, back(-each * (a / b), b, rank))

    def tangent(self, point: Point, dots: Values) -> Tensor | None:
        """See above."""
        a, b = self.factors(point)
        rank = max(a.dim(), b.dim())
        total: Tensor | None = None
        if dots[self.a] is not None:
            total = raised(dots[self.a], a, rank) / b
        if dots[self.b] is not None:
            part = raised(dots[self.b], b, rank) * (a / b) / -b
            total = part if total is None else total + part
        return total

    def bend(self, point: Point, dy: Tensor, dots: Values, grads: Gradients, products: Products) -> None:
        """See above."""
        a, b = self.factors(point)
        rank, each = max(a.dim(), b.dim()), -dy / b.square()
        adot = None if dots[self.a] is None else raised(dots[self.a], a, rank)
        bdot = None if dots[self.b] is None else raised(dots[self.b], b, rank)
        if bdot is not None and grads.wants(self.a):
            grads.add(self.a, over_latents(back(each * bdot, a, rank), a.dim()))
        if grads.wants(self.b):
            along = bdot if bdot is None else bdot * (a / b) * -2
            along = along if adot is None else adot if along is None else adot + along
            if along is not None:
                grads.add(self.b, over_latents(back(each * along, b, rank), b.dim()))


@layer_of("div")
def quotient(operation: Any, active: Sequence[bool]) -> Layer | None:
    """aten.div(a, b)."""
    if operation.kwargs or len(operation.args) != 2:
        return None
    a, b = operation.args
    if isinstance(a, Slot) and isinstance(b, (int, float)) and b != 0:
        return ScaleLayer(operation, active, 1 / b)
    return QuotientLayer(operation, active) if _are_tensors(operation) else None


@layer_of("mm", "bmm", "matmul")
def matrix_product(operation: Any, active: Sequence[bool]) -> Layer | None:
    """aten.matmul(a, b) of matrices, batches of them, and of those with a vector that does not depend on z."""
    return MatrixProduct(operation, active) if _are_tensors(operation) else None


class MatrixProduct(ProductLayer):
    """y = a b; a vector is a matrix of one row or column."""

    def __init__(self, operation: Any, active: Sequence[bool]) -> None:
        super().__init__(operation, active, torch.matmul, lambda dy, b: dy @ b.mT, lambda a, dy: a.mT @ dy)

    def factors(self, point: Point) -> tuple[Tensor, Tensor]:
        """Both as matrices."""
        a, b = super().factors(point)
        return a.unsqueeze(0) if a.dim() == 1 else a, b.unsqueeze(1) if b.dim() == 1 else b

    def _one(self, point: Point) -> int:
        """The dimension of y that a vector leaves out; 0 if neither is one."""
        a, b = super().factors(point)
        return -2 if a.dim() == 1 else -1 if b.dim() == 1 else 0

    def forward(self, point: Point) -> Tensor:
        """y."""
        if any(self.active[index] and point.values[index].dim() < 2 for index in (self.a, self.b)):
            raise UnsupportedLayer("it multiplies a vector of one number of each sample by a matrix")
        return super().forward(point)

    def reverse(self, point: Point, dy: Tensor, grads: Gradients, products: Products | None) -> None:
        """See ``ProductLayer``."""
        one = self._one(point)
        super().reverse(point, dy.unsqueeze(one) if one else dy, grads, products)

    def tangent(self, point: Point, dots: Values) -> Tensor | None:
        """See ``ProductLayer``."""
        one, dot = self._one(point), super().tangent(point, dots)
        return dot.squeeze(one) if one and dot is not None else dot

    def bend(self, point: Point, dy: Tensor, dots: Values, grads: Gradients, products: Products) -> None:
        """See ``ProductLayer``."""
        one = self._one(point)
        super().bend(point, dy.unsqueeze(one) if one else dy, dots, grads, products)


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
