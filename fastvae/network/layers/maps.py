"""Linear maps without parameters: padding, upsampling, average pooling, pixel shuffles, folds.

Rows are independent. The reverse is PyTorch's own, of a graph of this one operation, which holds sizes and no numbers.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge

from fastvae._compiling import is_captured
from fastvae.network.program import Operation
from fastvae.network.tape import fixed, kernel, outside

from .base import Gradients, Layer, Point, Products, Values, folded, latents_of, layer_of, unfolded

_SHAPES = 16
"""Shapes of which a layer remembers the transpose."""


class Transposed:
    """The transpose of a map, for rows of one shape.

    Args:
        apply: the map.
        shape: of its argument.
        like: of the dtype, on the device.
    """

    def __init__(self, apply: Callable[[Tensor], Tensor], shape: Sequence[int], like: Tensor) -> None:
        # One number, however many are looked at.
        empty = torch.empty_strided(tuple(shape), (0,) * len(shape), dtype=like.dtype, device=like.device)
        leaf = empty.requires_grad_()
        with torch.enable_grad():
            # The tensors themselves are let go, but for what operators on a GPU look at.
            self._result, self._argument = get_gradient_edge(apply(leaf)), get_gradient_edge(leaf)
        self._leaf = None if like.is_cpu else leaf

    def __call__(self, dy: Tensor) -> Tensor:
        """Of a cotangent of the result."""
        (found,) = torch.autograd.grad(self._result, self._argument, dy, retain_graph=True)
        return found

    def noted(self, dy: Tensor) -> Tensor:
        """The same, for straight code.

        A GPU gets the operators that autograd calls, which may look at the argument's sizes: what is a call of Python's
        has no place in a CUDA graph. For a CPU it is one call.
        """
        if self._leaf is None:
            return kernel(self, dy)
        fixed(self._leaf)
        return self(dy)


class MapLayer(Layer):
    """See above."""

    linear = True
    keeps_inputs = keeps_output = False

    def __init__(self, operation: Operation, active: Sequence[bool]) -> None:
        super().__init__(operation, active)
        self._transposed: dict[Any, Transposed] = {}

    def forward(self, point: Point) -> Tensor:
        """y."""
        x = point.values[self.x]
        y = self.operation.call(point.values)
        point.kept[self.index] = x.shape, y.dim()
        return y

    def _apply(self, point: Point, rows: Tensor) -> Tensor:
        values = list(point.values)
        values[self.x] = rows
        # A fill that is not zero is no part of the derivative.
        return self.operation.call(values)

    def _transpose(self, point: Point, rows: Tensor, x: Sequence[int]) -> Transposed:
        numbers = tuple(point.values[slot] for slot in self.slots if slot != self.x)
        key = len(rows), tuple(x[1:]), rows.dtype, rows.device, numbers
        found = self._transposed.get(key)
        if found is None or is_captured(rows):
            found = Transposed(
                functools.partial(self._apply, Point(list(point.values), ())), key[:1] + key[1], rows
            )
            # A graph of autograd belongs to the stream on which it was made: a CUDA graph has one of its own.
            if not is_captured(rows):
                if len(self._transposed) >= _SHAPES:
                    self._transposed.clear()
                self._transposed[key] = found
        return found

    def reverse(self, point: Point, dy: Tensor, grads: Gradients, products: Products | None) -> None:
        """The transposed map."""
        if not grads.wants(self.x):
            return
        x, rank = point.kept[self.index]
        latents = latents_of(dy, rank)
        rows = folded(dy, rank)
        transposed = outside(self._transpose, point, rows, x)
        grads.add(self.x, unfolded(transposed.noted(rows), latents))

    def tangent(self, point: Point, dots: Values) -> Tensor:
        """The map of xdot."""
        rank, dot = len(point.kept[self.index][0]), dots[self.x]
        return unfolded(self._apply(point, folded(dot, rank)), latents_of(dot, rank))


@layer_of(
    "upsample_nearest1d", "upsample_nearest2d", "upsample_nearest3d", "upsample_linear1d", "upsample_bilinear2d",
    "upsample_trilinear3d", "upsample_bicubic2d", "reflection_pad1d", "reflection_pad2d", "reflection_pad3d",
    "replication_pad1d", "replication_pad2d", "replication_pad3d", "avg_pool1d", "avg_pool2d", "avg_pool3d",
    "_upsample_nearest_exact1d", "_upsample_nearest_exact2d", "_upsample_nearest_exact3d", "adaptive_avg_pool1d",
    "adaptive_avg_pool2d", "adaptive_avg_pool3d", "_adaptive_avg_pool2d", "_adaptive_avg_pool3d", "pixel_shuffle",
    "pixel_unshuffle", "channel_shuffle", "col2im", "im2col",
)  # fmt: skip
def image_map(operation: Any, active: Sequence[bool]) -> Layer | None:
    """One active tensor, and numbers."""
    tensors = [slot for slot in operation.slots if active[slot]]
    return MapLayer(operation, active) if tensors == [operation.args[0].index] else None


@layer_of("pad", "constant_pad_nd")
def padding(operation: Any, active: Sequence[bool]) -> Layer | None:
    """aten.pad(x, pads, mode="constant", value=None): of the rows' own dimensions."""
    if tuple(slot for slot in operation.slots if active[slot]) != (operation.args[0].index,):
        return None
    return PadLayer(operation, active)


class PadLayer(MapLayer):
    """Padding; a fill other than zero vanishes from the tangent."""

    def _apply(self, point: Point, rows: Tensor) -> Tensor:
        _, pads, *rest = self.operation.arguments(point.values)
        mode = rest[0] if rest and isinstance(rest[0], str) else "constant"
        return torch.nn.functional.pad(rows, pads, mode)

    def forward(self, point: Point) -> Tensor:
        """y."""
        pads = self.operation.arguments(point.values)[1]
        if len(pads) > 2 * (point.values[self.x].dim() - 1):
            raise NotImplementedError("padding of the batch")
        return super().forward(point)
