"""Functions of one element: y = phi(x).

reverse and tangent multiply by phi'(x), and bend by phi''(x) dy xdot, which is zero where phi is linear in pieces.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .base import Gradients, Layer, Maker, Point, Products, Values, layer_of, over_latents

aten = torch.ops.aten


class Pointwise(NamedTuple):
    """phi by its derivatives.

    slope: (v, x, y, *args) -> v phi'(x), v of x's shape or with latents in front.
    curve: (x, y, *args) -> phi''(x); None where it is zero.
    of: what the two look at: "x", "y" or "xy".
    """

    slope: Callable[..., Tensor]
    curve: Callable[..., Tensor] | None
    of: str


class PointwiseLayer(Layer):
    """See above."""

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


def _of_y(slope: Callable[..., Tensor], curve: Callable[..., Tensor] | None) -> Pointwise:
    return Pointwise(
        lambda v, x, y, *args: slope(v, y, *args),
        None if curve is None else lambda x, y, *args: curve(y, *args),
        "y",
    )


def _of_x(slope: Callable[..., Tensor], curve: Callable[..., Tensor] | None) -> Pointwise:
    return Pointwise(
        lambda v, x, y, *args: slope(v, x, *args),
        None if curve is None else lambda x, y, *args: curve(x, *args),
        "x",
    )


def _elu_slope(
    v: Tensor, y: Tensor, alpha: float = 1.0, scale: float = 1.0, input_scale: float = 1.0
) -> Tensor:
    return torch.where(y > 0, v * (scale * input_scale), v * ((y + alpha * scale) * input_scale))


def _elu_curve(y: Tensor, alpha: float = 1.0, scale: float = 1.0, input_scale: float = 1.0) -> Tensor:
    return ((y + alpha * scale) * input_scale**2).masked_fill(y > 0, 0.0)


def _celu_factors(alpha: float) -> tuple[float, float, float]:
    # As PyTorch's own derivative has it, which takes alpha in float32.
    return alpha, 1.0, 1 / struct.unpack("f", struct.pack("f", alpha))[0]


def _celu_slope(v: Tensor, x: Tensor, alpha: float = 1.0) -> Tensor:
    return aten.elu_backward(v, *_celu_factors(alpha), False, x.expand_as(v))


def _celu_curve(x: Tensor, alpha: float = 1.0) -> Tensor:
    _, _, scale = _celu_factors(alpha)
    return (alpha * scale**2 * torch.exp(x * scale)).masked_fill(x > 0, 0.0)


_SELU = (1.6732632423543772848170429916717, 1.0507009873554804934193349852946)


def _softplus_slope(v: Tensor, x: Tensor, beta: float = 1.0, threshold: float = 20.0) -> Tensor:
    return aten.softplus_backward(v, x.expand_as(v), beta, threshold)


def _softplus_curve(x: Tensor, beta: float = 1.0, threshold: float = 20.0) -> Tensor:
    s = torch.sigmoid(beta * x)
    return (beta * s * (1 - s)).masked_fill(beta * x > threshold, 0.0)


def _silu_curve(x: Tensor) -> Tensor:
    s = torch.sigmoid(x)
    return s * (1 - s) * (2 + x * (1 - 2 * s))


def _gelu_curve(x: Tensor, approximate: str = "none") -> Tensor:
    if approximate == "none":
        return (2 - x * x) * torch.exp(-0.5 * x * x) / math.sqrt(2 * math.pi)
    c, k = math.sqrt(2 / math.pi), 0.044715
    t = torch.tanh(c * (x + k * x**3))
    inner = c * (1 + 3 * k * x * x)
    s = 1 - t * t
    return s * (inner + 0.5 * x * (6 * c * k * x) - x * t * inner * inner)


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


_RELU = _of_y(lambda v, y: aten.threshold_backward(v, y.expand_as(v), 0), None)

FUNCTIONS: dict[str, Pointwise] = {
    "relu": _RELU,
    "leaky_relu": _of_x(
        lambda v, x, slope=0.01: aten.leaky_relu_backward(v, x.expand_as(v), slope, False), None
    ),
    "elu": _of_y(_elu_slope, _elu_curve),
    "selu": _of_y(lambda v, y: _elu_slope(v, y, *_SELU), lambda y: _elu_curve(y, *_SELU)),
    "celu": _of_x(_celu_slope, _celu_curve),
    "tanh": _of_y(lambda v, y: v * (1 - y * y), lambda y: -2 * y * (1 - y * y)),
    "sigmoid": _of_y(lambda v, y: v * (y * (1 - y)), lambda y: y * (1 - y) * (1 - 2 * y)),
    "softplus": _of_x(_softplus_slope, _softplus_curve),
    "silu": _of_x(lambda v, x: aten.silu_backward(v, x.expand_as(v)), _silu_curve),
    "gelu": _of_x(
        lambda v, x, approximate="none": aten.gelu_backward(v, x.expand_as(v), approximate=approximate),
        _gelu_curve,
    ),
    "mish": _of_x(lambda v, x: aten.mish_backward(v, x.expand_as(v)), _mish_curve),
    "hardtanh": _of_x(
        lambda v, x, low=-1.0, high=1.0: aten.hardtanh_backward(v, x.expand_as(v), low, high), None
    ),
    "relu6": _of_x(lambda v, x: aten.hardtanh_backward(v, x.expand_as(v), 0.0, 6.0), None),
    "hardsigmoid": _of_x(lambda v, x: aten.hardsigmoid_backward(v, x.expand_as(v)), None),
    "clamp": _of_x(_clamp_slope, None),
    "clamp_min": _of_x(lambda v, x, low: _clamp_slope(v, x, low), None),
    "clamp_max": _of_x(lambda v, x, high: _clamp_slope(v, x, None, high), None),
    "abs": _of_x(lambda v, x: v * x.sign(), None),
    "neg": _of_x(lambda v, x: -v, None),
    "exp": _of_y(lambda v, y: v * y, lambda y: y),
    "log": _of_x(lambda v, x: v / x, lambda x: -1 / (x * x)),
    "sqrt": _of_y(lambda v, y: v / (2 * y), lambda y: -1 / (4 * y**3)),
    "rsqrt": _of_y(lambda v, y: v * (-0.5 * y**3), lambda y: 0.75 * y**5),
    "reciprocal": _of_y(lambda v, y: -v * (y * y), lambda y: 2 * y**3),
    "sin": _of_x(lambda v, x: v * x.cos(), lambda x: -x.sin()),
    "cos": _of_x(lambda v, x: -v * x.sin(), lambda x: -x.cos()),
    "square": _of_x(lambda v, x: v * (2 * x), lambda x: torch.full_like(x, 2.0)),
    "log_sigmoid": _of_x(lambda v, x: v * torch.sigmoid(-x), lambda x: -torch.sigmoid(x) * torch.sigmoid(-x)),
    "hardswish": _of_x(_hardswish_slope, lambda x: ((x > -3) & (x < 3)).to(x.dtype) / 3),
    "softsign": _of_x(lambda v, x: v / (1 + x.abs()).square(), lambda x: -2 * x.sign() / (1 + x.abs()) ** 3),
    "pow": _of_x(_power_slope, _power_curve),
    "exp2": _of_y(lambda v, y: v * (y * math.log(2)), lambda y: y * math.log(2) ** 2),
    "log1p": _of_x(lambda v, x: v / (1 + x), lambda x: -1 / (1 + x).square()),
    "log2": _of_x(lambda v, x: v / (x * math.log(2)), lambda x: -1 / (x * x * math.log(2))),
    "log10": _of_x(lambda v, x: v / (x * math.log(10)), lambda x: -1 / (x * x * math.log(10))),
    "lgamma": _of_x(lambda v, x: v * torch.digamma(x), lambda x: torch.polygamma(1, x)),
    "digamma": _of_x(lambda v, x: v * torch.polygamma(1, x), lambda x: torch.polygamma(2, x)),
    "erf": _of_x(lambda v, x: v * _erf_slope(x), lambda x: -2 * x * _erf_slope(x)),
    "erfc": _of_x(lambda v, x: -v * _erf_slope(x), lambda x: 2 * x * _erf_slope(x)),
    "atan": _of_x(lambda v, x: v / (1 + x * x), lambda x: -2 * x / (1 + x * x).square()),
    "tan": _of_y(lambda v, y: v * (1 + y * y), lambda y: 2 * y * (1 + y * y)),
    "sinh": _of_x(lambda v, x: v * x.cosh(), lambda x: x.sinh()),
    "cosh": _of_x(lambda v, x: v * x.sinh(), lambda x: x.cosh()),
    "logit": _of_x(_logit_slope, _logit_curve),
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
