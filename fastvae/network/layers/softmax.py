"""Softmax, its logarithm, and log-sum-exp: what couples the elements of a row through their exponentials."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .base import Gradients, Layer, Point, Products, Values, layer_of, over_latents


class Softmax(Layer):
    """y = softmax(x) along a dimension: dx = y (dy - <dy, y>), which is the tangent's rule as well.

    The second-order term, with ydot the tangent: dx = ydot (dy - <dy, y>) - y <dy, ydot>.
    """

    keeps_inputs = False

    def __init__(self, operation: Any, active: Sequence[bool], dim: int) -> None:
        super().__init__(operation, active)
        self.dim = dim

    def _dim(self, y: Tensor) -> int:
        return self.dim if self.dim < 0 else self.dim - y.dim()

    def _apply(self, v: Tensor, y: Tensor) -> Tensor:
        return y * (v - (v * y).sum(self._dim(y), keepdim=True))

    def reverse(self, point: Point, dy: Tensor, grads: Gradients, products: Products | None) -> None:
        """See above."""
        if grads.wants(self.x):
            grads.add(self.x, self._apply(dy, point.values[self.index]))

    def tangent(self, point: Point, dots: Values) -> Tensor:
        """See above."""
        return self._apply(dots[self.x], point.values[self.index])

    def bend(self, point: Point, dy: Tensor, dots: Values, grads: Gradients, products: Products) -> None:
        """See above."""
        if dots[self.x] is None or not grads.wants(self.x):
            return
        y = point.values[self.index]
        dim, ydot = self._dim(y), self.tangent(point, dots)
        bent = ydot * (dy - (dy * y).sum(dim, keepdim=True)) - y * (dy * ydot).sum(dim, keepdim=True)
        grads.add(self.x, over_latents(bent, y.dim()))


@layer_of("softmax", "_softmax", "_safe_softmax")
def softmax(operation: Any, active: Sequence[bool]) -> Layer | None:
    """aten.softmax(x, dim)."""
    third = operation.args[2] if len(operation.args) > 2 else None
    if operation.kwargs or third not in (None, False):
        return None
    return Softmax(operation, active, operation.args[1])


class LogSoftmax(Softmax):
    """y = log softmax(x), p = exp(y): dx = dy - p sum dy, xdot - <p, xdot>; bend -(p xdot - p <p, xdot>) sum dy."""

    def reverse(self, point: Point, dy: Tensor, grads: Gradients, products: Products | None) -> None:
        """See above."""
        if grads.wants(self.x):
            y = point.values[self.index]
            grads.add(self.x, dy - y.exp() * dy.sum(self._dim(y), keepdim=True))

    def tangent(self, point: Point, dots: Values) -> Tensor:
        """See above."""
        y, dot = point.values[self.index], dots[self.x]
        return dot - (y.exp() * dot).sum(self._dim(y), keepdim=True)

    def bend(self, point: Point, dy: Tensor, dots: Values, grads: Gradients, products: Products) -> None:
        """See above."""
        if dots[self.x] is not None and grads.wants(self.x):
            y = point.values[self.index]
            bent = -y.exp() * self.tangent(point, dots) * dy.sum(self._dim(y), keepdim=True)
            grads.add(self.x, over_latents(bent, y.dim()))


@layer_of("log_softmax", "_log_softmax")
def log_softmax(operation: Any, active: Sequence[bool]) -> Layer | None:
    """aten.log_softmax(x, dim)."""
    third = operation.args[2] if len(operation.args) > 2 else None
    if operation.kwargs or third not in (None, False):
        return None
    return LogSoftmax(operation, active, operation.args[1])


class LogSumExp(Layer):
    """y = log sum exp(x) along dimensions, p = exp(x - y): dx = p dy, ydot = <p, xdot>; bend p (xdot - ydot) dy."""

    def __init__(self, operation: Any, active: Sequence[bool], dims: Sequence[int], keeps: bool) -> None:
        super().__init__(operation, active)
        self.dims, self.keeps = dims, keeps

    def _from_behind(self, rank: int) -> list[int]:
        return sorted(dim if dim < 0 else dim - rank for dim in self.dims)

    def _raised(self, y: Tensor, x: Tensor) -> Tensor:
        """y, or what stands in its place, with the dimensions that were summed over."""
        if not self.keeps:
            for dim in reversed(self._from_behind(x.dim())):
                y = y.unsqueeze(dim)
        return y

    def _p(self, point: Point) -> Tensor:
        found: Tensor | None = point.kept.get(self.index)
        if found is None:
            x = point.values[self.x]
            found = point.kept[self.index] = torch.exp(x - self._raised(point.values[self.index], x))
        return found

    def reverse(self, point: Point, dy: Tensor, grads: Gradients, products: Products | None) -> None:
        """See above."""
        if grads.wants(self.x):
            p = self._p(point)
            grads.add(self.x, p * self._raised(dy, p))

    def tangent(self, point: Point, dots: Values) -> Tensor:
        """See above."""
        p = self._p(point)
        return (p * dots[self.x]).sum(self._from_behind(p.dim()), keepdim=self.keeps)

    def bend(self, point: Point, dy: Tensor, dots: Values, grads: Gradients, products: Products) -> None:
        """See above."""
        if dots[self.x] is not None and grads.wants(self.x):
            p = self._p(point)
            bent = p * (dots[self.x] - self._raised(self.tangent(point, dots), p)) * self._raised(dy, p)
            grads.add(self.x, over_latents(bent, p.dim()))


@layer_of("logsumexp")
def logsumexp(operation: Any, active: Sequence[bool]) -> Layer | None:
    """aten.logsumexp(x, dims, keepdim=False)."""
    _, dims, *rest = operation.args
    return None if operation.kwargs else LogSumExp(operation, active, dims, bool(rest and rest[0]))
