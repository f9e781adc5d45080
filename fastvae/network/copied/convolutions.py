"""Convolutions of which every sample has its own weights, by the kernels of csrc/kernels/cpu/copied_convolution.cpp.

On a CPU; elsewhere PyTorch's convolutions of many groups do it. There weights lie as [B, taps, channels, filters].
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from fastvae._extension import raw
from fastvae.lowering import UnsupportedLayer
from fastvae.network.layers import Gradients, Layer, Point
from fastvae.network.layers.affine import ConvolutionLayer
from fastvae.network.layers.base import Products
from fastvae.network.program import Operation
from fastvae.network.tape import kernel

from .layers import CopiedLayer, CopiedPoint, Kinds, copied_layer_of, plain_layer_of
from .rows import rows_of, whole_of

__all__ = ["CopiedConvolution", "canonical", "stored"]


def stored(weight: Tensor) -> Tensor:
    """From PyTorch's [B, filters, channels, ...] to [B, taps, channels, filters]."""
    return weight.flatten(3).permute(0, 3, 2, 1).contiguous()


def canonical(weight: Tensor, kernel_size: Sequence[int]) -> Tensor:
    """Back to PyTorch's."""
    return weight.permute(0, 3, 2, 1).unflatten(3, tuple(kernel_size))


class CopiedConvolution(CopiedLayer):
    """y = W * x + b, or the transposed one.

    Args:
        plain: the same without copies.
    """

    keeps_output = False
    is_stored = False
    """Whether the weight is handed in as the kernels have it."""

    def __init__(self, operation: Operation, kinds: Kinds, plain: ConvolutionLayer) -> None:
        super().__init__(operation, kinds)
        self.x, self.weight, self.bias, self.geometry = plain.x, plain.weight, plain.bias, plain.geometry
        self._rules: dict[tuple[int, ...], Any] = {}

    def _rules_of(self, kernel_size: Sequence[int]) -> Any:
        key = tuple(kernel_size)
        if key not in self._rules:
            stride, padding, dilation, _, _, groups = self.geometry
            self._rules[key] = raw.CopiedConvolutionRules(list(key), stride, padding, dilation, groups)
        return self._rules[key]

    def _images(self, value: Tensor, slot: int, samples: int) -> Tensor:
        """[B images, channels, ...], each sample's one after the other."""
        axis = self.kinds.axes[slot]
        if axis.dim != 0 or value.dim() != len(self.geometry.stride) + 2:
            raise UnsupportedLayer("it is a convolution over samples")
        return value if axis.outer == 1 else rows_of(value, axis, samples).flatten(0, 1)

    def _value(self, images: Tensor, slot: int, samples: int) -> Tensor:
        """Back to the order of the value."""
        axis = self.kinds.axes[slot]
        return images if axis.outer == 1 else whole_of(images.unflatten(0, (samples, -1)), axis)

    def forward(self, point: Point) -> Tensor:
        """y."""
        assert isinstance(point, CopiedPoint)
        x = self._images(point.values[self.x], self.x, point.samples)
        weight = point.values[self.weight]
        bias = None if self.bias < 0 else point.values[self.bias]
        size = self.kernel_size if self.is_stored else tuple(weight.shape[3:])
        own = weight if self.is_stored else stored(weight)
        rules = self._rules_of(size)
        if self.geometry.transposed:
            y = kernel(rules.larger, x, own, bias, self._sizes(x, size))
        else:
            y = kernel(rules.smaller, x, own, bias)
        point.kept[self.index] = x, own, size
        return self._value(y, self.index, point.samples)

    kernel_size: tuple[int, ...] = ()
    """Where the weight is stored as the kernels have it."""

    def _sizes(self, x: Tensor, size: Sequence[int]) -> list[int]:
        """Of the images that a transposed convolution makes."""
        stride, padding, dilation, _, extra, _ = self.geometry
        numbers = zip(x.shape[2:], size, stride, padding, dilation, extra, strict=True)
        return [(n - 1) * s - 2 * p + d * (k - 1) + e + 1 for n, k, s, p, d, e in numbers]

    def reverse(self, point: Point, dy: Tensor, grads: Gradients, products: Products | None) -> None:
        """dx, dW and db."""
        assert isinstance(point, CopiedPoint)
        x, weight, size = point.kept.pop(self.index)
        rules, samples = self._rules_of(size), point.samples
        of_y = self._images(dy, self.index, samples)
        larger, smaller = (of_y, x) if self.geometry.transposed else (x, of_y)
        if grads.wants(self.x):
            if self.geometry.transposed:
                dx = kernel(rules.smaller, of_y, weight, None)
            else:
                dx = kernel(rules.larger, of_y, weight, None, list(x.shape[2:]))
            grads.add(self.x, self._value(dx, self.x, samples))
        of_weight = kernel(rules.weight, larger, smaller, samples)
        grads.add(self.weight, of_weight if self.is_stored else canonical(of_weight, size))
        if self.bias >= 0:
            rows = of_y.unflatten(0, (samples, -1))
            grads.add(self.bias, rows.sum([1, *range(3, rows.dim())]))


@copied_layer_of(
    "conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d", "convolution"
)
def convolution(operation: Operation, kinds: Kinds) -> Layer | None:
    """With a weight, and a bias if there is one, of the samples' own."""
    plain = plain_layer_of(operation, kinds)
    if kinds.device != "cpu" or type(plain) is not ConvolutionLayer:
        return None
    own = [each for each in (plain.weight, plain.bias) if each >= 0]
    if not all(kinds.is_copied[each] for each in own) or kinds.axes[plain.x] is None:
        return None
    extra, stride = plain.geometry.output_padding, plain.geometry.stride
    # With more than a stride of padding behind, a transposed convolution has windows that no position of x has.
    if any(a >= b for a, b in zip(extra, stride, strict=True)) or any(p < 0 for p in plain.geometry.padding):
        return None
    return CopiedConvolution(operation, kinds, plain)
