"""The Euclidean norm of vectors, as in F.normalize: y = |x|, whose derivatives at 0 are taken as 0, as PyTorch does."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .base import Gradients, Layer, Point, Products, Values, layer_of, over_latents


class Length(Layer):
    """dx = dy x / y, ydot = <x, xdot> / y, and the second-order term dy (xdot - x ydot / y) / y."""

    keeps_output = False

    def __init__(self, operation: Any, active: Sequence[bool], dims: Sequence[int], keepdim: bool) -> None:
        super().__init__(operation, active)
        self.dims, self.keepdim = list(dims), keepdim

    def forward(self, point: Point) -> Tensor:
        """y; kept are the dimensions from the end and x / y, 1 / y."""
        x: Tensor = point.values[self.x]
        dims = [dim if dim < 0 else dim - x.dim() for dim in self.dims]
        y = torch.linalg.vector_norm(x, dim=dims, keepdim=True)
        inverse = y.reciprocal().masked_fill(y == 0, 0.0)
        point.kept[self.index] = dims, x * inverse, inverse
        return y if self.keepdim else y.squeeze(dims)

    def _raised(self, dy: Tensor, dims: Sequence[int]) -> Tensor:
        if self.keepdim:
            return dy
        for dim in sorted(dims, reverse=True):
            dy = dy.unsqueeze(dim)
        return dy

    def reverse(self, point: Point, dy: Tensor, grads: Gradients, products: Products | None) -> None:
        """See above."""
        dims, unit, _ = point.kept[self.index]
        if grads.wants(self.x):
            grads.add(self.x, unit * self._raised(dy, dims))

    def tangent(self, point: Point, dots: Values) -> Tensor:
        """See above."""
        dims, unit, _ = point.kept[self.index]
        return (unit * dots[self.x]).sum(dims, keepdim=self.keepdim)

    def bend(self, point: Point, dy: Tensor, dots: Values, grads: Gradients, products: Products) -> None:
        """See above."""
        dims, unit, inverse = point.kept[self.index]
        dot = dots[self.x]
        if dot is not None and grads.wants(self.x):
            across = dot - unit * (unit * dot).sum(dims, keepdim=True)
            grads.add(self.x, over_latents(across * (inverse * self._raised(dy, dims)), unit.dim()))


@layer_of("linalg_vector_norm")
def length(operation: Any, active: Sequence[bool]) -> Layer | None:
    """aten.linalg_vector_norm(x, ord=2, dim, keepdim=False) along given dimensions."""
    given: list[Any] = list(operation.args[1:])
    defaults: list[Any] = [2, None, False]
    order, dims, keepdim = given + defaults[len(given) :]
    if operation.kwargs or order != 2 or not dims:
        return None
    return Length(operation, active, dims, bool(keepdim))
