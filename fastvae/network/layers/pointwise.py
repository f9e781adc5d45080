"""Functions of one element: y = phi(x).

reverse and tangent multiply by phi'(x), and bend by phi''(x) dy xdot, which is zero where phi is linear in pieces.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastvae.lowering.activations import ACTIVATIONS, Pointwise, elu_curve, elu_slope, of_x, of_y

from .base import Gradients, Layer, Maker, Point, Products, Values, layer_of, over_latents

aten = torch.ops.aten


class PointwiseLayer(Layer):
    """y = phi(x)."""

    def __init__(self, operation: Any, active: Sequence[bool], function: Pointwise) -> None:
        super().__init__(operation, active)
        self.function = function
        self.others = (*operation.args[1:], *operation.kwargs.values())
        self.linear = function.curve is None
        self.keeps_inputs, self.keeps_output = "x" in function.of, "y" in function.of

    def _of(self, point: Point) -> tuple[Any, ...]:
        return point.values[self.x], point.values[self.index], *self.others

    def _times_slope(self, point: Point, v: Tensor) -> Tensor:
        """phi'(x) v. The slope of a curved function is kept: it is asked for three times and costs more than v."""
        if self.linear:
            return self.function.slope(v, *self._of(point))
        slope = point.kept.get(self.index)
        if slope is None:
            like = point.values[self.x] if self.keeps_inputs else point.values[self.index]
            slope = point.kept[self.index] = self.function.slope(torch.ones_like(like), *self._of(point))
        return v * slope

    def reverse(self, point: Point, dy: Tensor, grads: Gradients, products: Products | None) -> None:
        """phi'(x) dy."""
        if grads.wants(self.x):
            grads.add(self.x, self._times_slope(point, dy))

    def tangent(self, point: Point, dots: Values) -> Tensor:
        """phi'(x) xdot."""
        return self._times_slope(point, dots[self.x])

    def bend(self, point: Point, dy: Tensor, dots: Values, grads: Gradients, products: Products) -> None:
        """phi''(x) dy xdot."""
        if self.function.curve is not None and dots[self.x] is not None and grads.wants(self.x):
            like = point.values[self.x] if self.keeps_inputs else point.values[self.index]
            along = over_latents(dy * dots[self.x], like.dim())
            grads.add(self.x, along * self.function.curve(*self._of(point)))


def _celu_factors(alpha: float) -> tuple[float, float, float]:
    # As PyTorch's own derivative has it, which takes alpha in float32.
    return alpha, 1.0, 1 / struct.unpack("f", struct.pack("f", alpha))[0]


def _celu_slope(v: Tensor, x: Tensor, alpha: float = 1.0) -> Tensor:
    return aten.elu_backward(v, *_celu_factors(alpha), False, x.expand_as(v))


def _celu_curve(x: Tensor, alpha: float = 1.0) -> Tensor:
    _, _, scale = _celu_factors(alpha)
    return (alpha * scale**2 * torch.exp(x * scale)).masked_fill(x > 0, 0.0)


_SELU = (1.6732632423543772848170429916717, 1.0507009873554804934193349852946)


def _mish_curve(x: Tensor) -> Tensor:
    # phi = x t, t = tanh(softplus(x)), t' = (1 - t^2) s, s = sigmoid(x).
    s = torch.sigmoid(x)
    t = torch.tanh(torch.nn.functional.softplus(x))
    d = 1 - t * t
    first = d * s
    second = d * s * (1 - s) - 2 * t * first * s
    return 2 * first + x * second


def _power_slope(v: Tensor, x: Tensor, exponent: float) -> Tensor:
    return v * (exponent * x.pow(exponent - 1))


def _power_curve(x: Tensor, exponent: float) -> Tensor:
    return exponent * (exponent - 1) * x.pow(exponent - 2) if exponent not in (0, 1) else torch.zeros_like(x)


def _clamp_slope(v: Tensor, x: Tensor, low: float | None = None, high: float | None = None) -> Tensor:
    inside = torch.ones_like(x, dtype=torch.bool)
    if low is not None:
        inside = x >= low
    if high is not None:
        inside = inside & (x <= high)
    return v * inside


def _hardswish_slope(v: Tensor, x: Tensor) -> Tensor:
    return aten.hardswish_backward(v, x.expand_as(v))


def _erf_slope(x: Tensor) -> Tensor:
    return torch.exp(-x * x) * (2 / math.sqrt(math.pi))


def _logit_slope(v: Tensor, x: Tensor, eps: float | None = None) -> Tensor:
    inside = v / (x * (1 - x))
    return inside if eps is None else inside.masked_fill((x < eps) | (x > 1 - eps), 0.0)


def _logit_curve(x: Tensor, eps: float | None = None) -> Tensor:
    return _logit_slope((2 * x - 1) / (x * (1 - x)), x, eps)


FUNCTIONS: dict[str, Pointwise] = {
    **{each.operator: each.derivatives for each in ACTIVATIONS if each.derivatives is not None},
    "selu": of_y(lambda v, y: elu_slope(v, y, *_SELU), lambda y: elu_curve(y, *_SELU)),
    "celu": of_x(_celu_slope, _celu_curve),
    "mish": of_x(lambda v, x: aten.mish_backward(v, x.expand_as(v)), _mish_curve),
    "hardtanh": of_x(
        lambda v, x, low=-1.0, high=1.0: aten.hardtanh_backward(v, x.expand_as(v), low, high), None
    ),
    "relu6": of_x(lambda v, x: aten.hardtanh_backward(v, x.expand_as(v), 0.0, 6.0), None),
    "hardsigmoid": of_x(lambda v, x: aten.hardsigmoid_backward(v, x.expand_as(v)), None),
    "clamp": of_x(_clamp_slope, None),
    "clamp_min": of_x(lambda v, x, low: _clamp_slope(v, x, low), None),
    "clamp_max": of_x(lambda v, x, high: _clamp_slope(v, x, None, high), None),
    "abs": of_x(lambda v, x: v * x.sign(), None),
    "neg": of_x(lambda v, x: -v, None),
    "exp": of_y(lambda v, y: v * y, lambda y: y),
    "log": of_x(lambda v, x: v / x, lambda x: -1 / (x * x)),
    "sqrt": of_y(lambda v, y: v / (2 * y), lambda y: -1 / (4 * y**3)),
    "rsqrt": of_y(lambda v, y: v * (-0.5 * y**3), lambda y: 0.75 * y**5),
    "reciprocal": of_y(lambda v, y: -v * (y * y), lambda y: 2 * y**3),
    "sin": of_x(lambda v, x: v * x.cos(), lambda x: -x.sin()),
    "cos": of_x(lambda v, x: -v * x.sin(), lambda x: -x.cos()),
    "square": of_x(lambda v, x: v * (2 * x), lambda x: torch.full_like(x, 2.0)),
    "log_sigmoid": of_x(lambda v, x: v * torch.sigmoid(-x), lambda x: -torch.sigmoid(x) * torch.sigmoid(-x)),
    "hardswish": of_x(_hardswish_slope, lambda x: ((x > -3) & (x < 3)).to(x.dtype) / 3),
    "softsign": of_x(lambda v, x: v / (1 + x.abs()).square(), lambda x: -2 * x.sign() / (1 + x.abs()) ** 3),
    "pow": of_x(_power_slope, _power_curve),
    "exp2": of_y(lambda v, y: v * (y * math.log(2)), lambda y: y * math.log(2) ** 2),
    "log1p": of_x(lambda v, x: v / (1 + x), lambda x: -1 / (1 + x).square()),
    "log2": of_x(lambda v, x: v / (x * math.log(2)), lambda x: -1 / (x * x * math.log(2))),
    "log10": of_x(lambda v, x: v / (x * math.log(10)), lambda x: -1 / (x * x * math.log(10))),
    "lgamma": of_x(lambda v, x: v * torch.digamma(x), lambda x: torch.polygamma(1, x)),
    "digamma": of_x(lambda v, x: v * torch.polygamma(1, x), lambda x: torch.polygamma(2, x)),
    "erf": of_x(lambda v, x: v * _erf_slope(x), lambda x: -2 * x * _erf_slope(x)),
    "erfc": of_x(lambda v, x: -v * _erf_slope(x), lambda x: 2 * x * _erf_slope(x)),
    "atan": of_x(lambda v, x: v / (1 + x * x), lambda x: -2 * x / (1 + x * x).square()),
    "tan": of_y(lambda v, y: v * (1 + y * y), lambda y: 2 * y * (1 + y * y)),
    "sinh": of_x(lambda v, x: v * x.cosh(), lambda x: x.sinh()),
    "cosh": of_x(lambda v, x: v * x.sinh(), lambda x: x.cosh()),
    "expm1": of_y(lambda v, y: v * (y + 1), lambda y: y + 1),
    "asin": of_x(lambda v, x: v * (1 - x * x).rsqrt(), lambda x: x * (1 - x * x) ** -1.5),
    "acos": of_x(lambda v, x: -v * (1 - x * x).rsqrt(), lambda x: -x * (1 - x * x) ** -1.5),
    "asinh": of_x(lambda v, x: v * (1 + x * x).rsqrt(), lambda x: -x * (1 + x * x) ** -1.5),
    "acosh": of_x(lambda v, x: v * (x * x - 1).rsqrt(), lambda x: -x * (x * x - 1) ** -1.5),
    "atanh": of_x(lambda v, x: v / (1 - x * x), lambda x: 2 * x / (1 - x * x).square()),
    "logit": of_x(_logit_slope, _logit_curve),
}
"""By the name of the operator."""


def pointwise_of(function: Pointwise) -> Maker:
    """What makes the layer of a function of one element, for :func:`layer_of`."""

    def make(operation: Any, active: Sequence[bool]) -> Layer | None:
        # Of keywords the only one is approximate, of gelu; export gives the others by position.
        if set(operation.kwargs) - {"approximate"}:
            return None
        arguments: list[Any] = [*operation.args, *operation.kwargs.values()]
        first, others = arguments[0], arguments[1:]
        plain = all(isinstance(arg, (int, float, str, type(None))) for arg in others)
        # pow is of x to a number here, and neither of a number to x nor of two tensors.
        if (
            len(operation.slots) != 1
            or not plain
            or not active[operation.slots[0]]
            or isinstance(first, (int, float))
        ):
            return None
        return PointwiseLayer(operation, active, function)

    return make


for name, entry in FUNCTIONS.items():
    if hasattr(aten, name):
        layer_of(name)(pointwise_of(entry))
