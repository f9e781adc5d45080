"""Linear layers and convolutions, plain and transposed, in one to three dimensions: y = A x + b.

Linear in x and in A: dx = A^T dy, dA = dy (x) x, db = sum dy; the second-order term is dA = dy (x) xdot alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastvae import _extension  # noqa: F401  (registers the operator)
from fastvae.network.tape import kernel

from .base import (
    Gradients,
    Layer,
    Pair,
    Point,
    Products,
    Values,
    folded,
    latents_of,
    layer_of,
    stacked,
    unfolded,
)

_PRODUCT = torch.ops.fastvae_internal.matrix_product.default


class AffineLayer(Layer):
    """What Linear and convolutions share: x active, A and b passive."""

    keeps_output = False

    def __init__(self, operation: Any, active: Sequence[bool], weight: int, bias: int) -> None:
        super().__init__(operation, active)
        self.weight, self.bias = weight, bias

    def apply(self, x: Tensor, weight: Tensor) -> Tensor:
        """A x."""
        raise NotImplementedError

    def pull(self, dy: Tensor, x: Tensor, weight: Tensor) -> Tensor:
        """A^T dy."""
        raise NotImplementedError

    def outer(self, x: Tensor, dy: Tensor, weight: Tensor) -> Tensor:
        """dA = dy (x) x, summed over rows."""
        raise NotImplementedError

    def sums(self, dy: Tensor) -> Tensor:
        """db."""
        raise NotImplementedError

    def reverse(self, point: Point, dy: Tensor, grads: Gradients, products: Products | None) -> None:
        """See above."""
        x, weight = point.values[self.x], point.values[self.weight]
        if grads.wants(self.x):
            grads.add(self.x, unfolded(self.pull(folded(dy, x.dim()), x, weight), latents_of(dy, x.dim())))
        if products is not None and self._trains(grads):
            products.add(self, weight, Pair(x, dy, True))

    def tangent(self, point: Point, dots: Values) -> Tensor:
        """A xdot."""
        x, weight, dot = point.values[self.x], point.values[self.weight], dots[self.x]
        return unfolded(self.apply(folded(dot, x.dim()), weight), latents_of(dot, x.dim()))

    def bend(self, point: Point, dy: Tensor, dots: Values, grads: Gradients, products: Products) -> None:
        """dA = dy (x) xdot."""
        if dots[self.x] is not None and grads.wants(self.weight):
            rank = point.values[self.x].dim()
            pair = Pair(folded(dots[self.x], rank), folded(dy, rank), False)
            products.add(self, point.values[self.weight], pair)

    def product(self, values: Values, pairs: list[Pair], wanted: Sequence[bool]) -> list[tuple[int, Tensor]]:
        """dA of all pairs at once, db of those that have one."""
        found = []
        if wanted[self.weight]:
            x, dy = stacked([pair.x for pair in pairs]), stacked([pair.dy for pair in pairs])
            found.append((self.weight, self.outer(x, dy, values[self.weight])))
        of_bias = [pair.dy for pair in pairs if pair.of_bias]
        if self.bias >= 0 and wanted[self.bias] and of_bias:
            sums = [self.sums(dy) for dy in of_bias]
            found.append((self.bias, sum(sums[1:], sums[0])))
        return found

    def _trains(self, grads: Gradients) -> bool:
        return grads.wants(self.weight) or (self.bias >= 0 and grads.wants(self.bias))


class LinearLayer(AffineLayer):
    """y = x W^T + b."""

    def forward(self, point: Point) -> Tensor:
        """A x + b."""
        y = self.apply(point.values[self.x], point.values[self.weight])
        return y if self.bias < 0 else y.add_(point.values[self.bias])

    def apply(self, x: Tensor, weight: Tensor) -> Tensor:
        """See ``AffineLayer``."""
        return kernel(_PRODUCT, x, weight.mT)

    def pull(self, dy: Tensor, x: Tensor, weight: Tensor) -> Tensor:
        """See ``AffineLayer``."""
        return kernel(_PRODUCT, dy, weight)

    def outer(self, x: Tensor, dy: Tensor, weight: Tensor) -> Tensor:
        """See ``AffineLayer``."""
        return kernel(_PRODUCT, dy.flatten(0, -2).mT, x.flatten(0, -2))

    def sums(self, dy: Tensor) -> Tensor:
        """See ``AffineLayer``."""
        return dy.flatten(0, -2).sum(0)


@layer_of("linear")
def linear(operation: Any, active: Sequence[bool]) -> Layer | None:
    """aten.linear(x, weight, bias=None)."""
    x, weight, *bias = operation.args
    places = _places(active, x, weight, *bias)
    return None if places is None else LinearLayer(operation, active, places[0], places[1])


def _places(active: Sequence[bool], x: Any, weight: Any, bias: Any = None) -> tuple[int, int] | None:
    """The numbers of weight and bias (-1: none), if they are passive and x is active."""
    if not active[x.index] or active[weight.index] or (bias is not None and active[bias.index]):
        return None
    return weight.index, -1 if bias is None else bias.index


class Geometry(NamedTuple):
    """The numbers of a convolution, as aten.convolution takes them after weight and bias."""

    stride: list[int]
    padding: list[int]
    dilation: list[int]
    transposed: bool
    output_padding: list[int]
    groups: int


class ConvolutionLayer(AffineLayer):
    """A convolution or a transposed one."""

    channels_last = True
    """Whether its weight's layout asks for that of its results; see layout.py."""

    def __init__(
        self, operation: Any, active: Sequence[bool], weight: int, bias: int, geometry: Geometry
    ) -> None:
        super().__init__(operation, active, weight, bias)
        self.geometry = geometry

    def prepare(self, values: Values) -> None:
        """On a CPU with the channels last, which is up to twice as fast; what follows then has the same layout."""
        if not self.channels_last:
            return
        weight = values[self.weight]
        layout = {4: torch.channels_last, 5: torch.channels_last_3d}.get(weight.dim())
        if layout is not None and weight.device.type == "cpu":
            weight = weight.contiguous(memory_format=layout)
            # One channel, or one place, has both layouts: it must say that it means this one.
            values[self.weight] = weight.as_strided(weight.shape, _strides_of_channels_last(weight.shape))

    def forward(self, point: Point) -> Tensor:
        """y."""
        weight = point.values[self.weight]
        bias = point.values[self.bias] if self.bias >= 0 else None
        return torch.convolution(point.values[self.x], weight, bias, *self.geometry)

    def apply(self, x: Tensor, weight: Tensor) -> Tensor:
        """See ``AffineLayer``."""
        return torch.convolution(x, weight, None, *self.geometry)

    def pull(self, dy: Tensor, x: Tensor, weight: Tensor) -> Tensor:
        """See ``AffineLayer``."""
        if self.geometry.transposed:
            stride, padding, dilation, _, _, groups = self.geometry
            return torch.convolution(
                dy, weight, None, stride, padding, dilation, False, [0] * len(stride), groups
            )
        shape_of_x = x if len(dy) == len(x) else x.new_empty(len(dy), *x.shape[1:])
        return self._backward(dy, shape_of_x, weight, [True, False, False])[0]

    def outer(self, x: Tensor, dy: Tensor, weight: Tensor) -> Tensor:
        """See ``AffineLayer``."""
        return self._backward(dy, x, weight, [False, True, False])[1]

    def sums(self, dy: Tensor) -> Tensor:
        """See ``AffineLayer``."""
        return dy.sum((0, *range(2, dy.dim())))

    def _backward(self, dy: Tensor, x: Tensor, weight: Tensor, mask: list[bool]) -> tuple[Any, ...]:
        return torch.ops.aten.convolution_backward(dy, x, weight, None, *self.geometry, mask)


def _strides_of_channels_last(shape: Sequence[int]) -> list[int]:
    _, channels, *places = shape
    strides = [channels * math.prod(places[at + 1 :]) for at in range(len(places))]
    return [channels * math.prod(places), 1, *strides]


class SameConvolution(ConvolutionLayer):
    """padding="same": zeros around x, of which the end has one more where they cannot be shared out evenly."""

    def _padded(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.pad(x, [count for pair in self._zeros(weight)[::-1] for count in pair])

    def _zeros(self, weight: Tensor) -> list[tuple[int, int]]:
        """Before and behind, by dimension."""
        extents = zip(self.geometry.dilation, weight.shape[2:], strict=True)
        return [(n // 2, n - n // 2) for n in (dilation * (size - 1) for dilation, size in extents)]

    def forward(self, point: Point) -> Tensor:
        """y."""
        weight = point.values[self.weight]
        bias = point.values[self.bias] if self.bias >= 0 else None
        return torch.convolution(self._padded(point.values[self.x], weight), weight, bias, *self.geometry)

    def apply(self, x: Tensor, weight: Tensor) -> Tensor:
        """See ``AffineLayer``."""
        return super().apply(self._padded(x, weight), weight)

    def pull(self, dy: Tensor, x: Tensor, weight: Tensor) -> Tensor:
        """See ``AffineLayer``."""
        found = super().pull(dy, self._padded(x, weight), weight)
        for dim, (before, _) in enumerate(self._zeros(weight), 2):
            found = found.narrow(dim, before, x.shape[dim])
        return found

    def outer(self, x: Tensor, dy: Tensor, weight: Tensor) -> Tensor:
        """See ``AffineLayer``."""
        return super().outer(self._padded(x, weight), dy, weight)


def _several(value: Any, dims: int) -> list[int]:
    values = list(value) if isinstance(value, (list, tuple)) else [value]
    return values * dims if len(values) == 1 else values


def _padded(args: Sequence[Any], defaults: tuple[Any, ...]) -> list[Any]:
    """Arguments by position, with the defaults of those that were left out."""
    return [*args, *defaults[len(args) :]]


@layer_of("conv1d", "conv2d", "conv3d")
def convolution(operation: Any, active: Sequence[bool]) -> Layer | None:
    """aten.conv{1,2,3}d(x, weight, bias, stride, padding, dilation, groups)."""
    dims = int(operation.kind[4])
    x, weight, bias, *numbers = _padded(operation.args, (None, None, None, 1, 0, 1, 1))
    places = _places(active, x, weight, bias)
    stride, padding, dilation, groups = numbers
    if places is None:
        return None
    kind = SameConvolution if padding == "same" else ConvolutionLayer
    padding = 0 if isinstance(padding, str) else padding
    each = [_several(value, dims) for value in (stride, padding, dilation)]
    geometry = Geometry(each[0], each[1], each[2], False, [0] * dims, groups)
    return kind(operation, active, *places, geometry)


@layer_of("conv_transpose1d", "conv_transpose2d", "conv_transpose3d")
def transposed_convolution(operation: Any, active: Sequence[bool]) -> Layer | None:
    """aten.conv_transpose{1,2,3}d(x, weight, bias, stride, padding, output_padding, groups, dilation)."""
    dims = int(operation.kind[len("conv_transpose")])
    x, weight, bias, *numbers = _padded(operation.args, (None, None, None, 1, 0, 0, 1, 1))
    places = _places(active, x, weight, bias)
    if places is None:
        return None
    stride, padding, extra, groups, dilation = numbers
    each = [_several(value, dims) for value in (stride, padding, dilation)]
    geometry = Geometry(each[0], each[1], each[2], True, _several(extra, dims), groups)
    return ConvolutionLayer(operation, active, *places, geometry)


@layer_of("convolution")
def any_convolution(operation: Any, active: Sequence[bool]) -> Layer | None:
    """aten.convolution(x, weight, bias, stride, padding, dilation, transposed, output_padding, groups)."""
    x, weight, bias, *numbers = operation.args
    places = _places(active, x, weight, bias)
    if places is None or any(not isinstance(size, int) for part in numbers[:3] for size in part):
        return None
    return ConvolutionLayer(operation, active, *places, Geometry(*numbers))
