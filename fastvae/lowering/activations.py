"""The activations that kernels know, in one table: where they are met, their text for a network, their derivatives.

C++ has the other table, ``csrc/kernels/math/activations.h``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = [
    "ACTIVATIONS",
    "Activation",
    "Pointwise",
    "Words",
    "elu_curve",
    "elu_slope",
    "of_x",
    "of_y",
    "words_of_operator",
]

aten = torch.ops.aten

Words = tuple[str, tuple[float, ...]]
"""The name of an activation in a network's text, and its numbers there."""


class Pointwise(NamedTuple):
    """A function phi of one element by its derivatives.

    slope: (v, x, y, *args) -> v phi'(x), v of x's shape or with latents in front.
    curve: (x, y, *args) -> phi''(x); None where it is zero.
    of: what the two look at: "x", "y" or "xy".
    """

    slope: Callable[..., Tensor]
    curve: Callable[..., Tensor] | None
    of: str


def of_y(slope: Callable[..., Tensor], curve: Callable[..., Tensor] | None) -> Pointwise:
    """phi by slope(v, y, *args) and curve(y, *args)."""
    return Pointwise(
        lambda v, x, y, *args: slope(v, y, *args),
        None if curve is None else lambda x, y, *args: curve(y, *args),
        "y",
    )


def of_x(slope: Callable[..., Tensor], curve: Callable[..., Tensor] | None) -> Pointwise:
    """phi by slope(v, x, *args) and curve(x, *args)."""
    return Pointwise(
        lambda v, x, y, *args: slope(v, x, *args),
        None if curve is None else lambda x, y, *args: curve(x, *args),
        "x",
    )


class Activation(NamedTuple):
    """One that kernels know.

    operator: its ATen operator.
    words: from what its torch.nn.functional namesake takes besides x, to the text.
    attributes: of those the ones that ``module`` has, by the same names.
    functions: what calls it in a traced network: functions, and names of methods.
    run: by the name in the text, phi(x, *numbers).
    derivatives: what its operator takes beside x goes to both; None: ``network/layers/pointwise.py`` has them.
    takes: whether kernels have formulas for these numbers.
    """

    operator: str
    words: Callable[..., Words]
    module: type[nn.Module]
    attributes: tuple[str, ...]
    functions: tuple[Any, ...]
    run: Mapping[str, Callable[..., Tensor]]
    derivatives: Pointwise | None = None
    takes: Callable[..., bool] = lambda *numbers: True

    def of_module(self, module: nn.Module) -> Words:
        """The words of a module of this kind."""
        return self.words(**{name: getattr(module, name) for name in self.attributes})


def words_of_operator(operator: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Words | None:
    """The words of an ATen operator by what it takes besides x; None where kernels do not know it."""
    activation = _BY_OPERATOR.get(operator)
    if activation is None:
        return None
    if operator == "elu":  # which has two scales besides, for SELU and CELU
        if any(scale != 1 for scale in args[1:]):
            return None
        args = args[:1]
    kind, numbers = activation.words(*args, **kwargs)
    return (kind, numbers) if activation.takes(*numbers) else None


def _relu(inplace: bool = False) -> Words:
    return "relu", ()


def _leaky_relu(negative_slope: float = 0.01, inplace: bool = False) -> Words:
    return "leaky_relu", (negative_slope,)


def _elu(alpha: float = 1.0, inplace: bool = False) -> Words:
    return "elu", (alpha,)


def elu_slope(
    v: Tensor, y: Tensor, alpha: float = 1.0, scale: float = 1.0, input_scale: float = 1.0
) -> Tensor:
    """v times the derivative of ATen's elu, from its result."""
    return torch.where(y > 0, v * (scale * input_scale), v * ((y + alpha * scale) * input_scale))


def elu_curve(y: Tensor, alpha: float = 1.0, scale: float = 1.0, input_scale: float = 1.0) -> Tensor:
    """Its second derivative."""
    return ((y + alpha * scale) * input_scale**2).masked_fill(y > 0, 0.0)


def _softplus(beta: float = 1.0, threshold: float = 20.0) -> Words:
    return "softplus", (beta, threshold)


def _softplus_slope(v: Tensor, x: Tensor, beta: float = 1.0, threshold: float = 20.0) -> Tensor:
    return aten.softplus_backward(v, x.expand_as(v), beta, threshold)


def _softplus_curve(x: Tensor, beta: float = 1.0, threshold: float = 20.0) -> Tensor:
    s = torch.sigmoid(beta * x)
    return (beta * s * (1 - s)).masked_fill(beta * x > threshold, 0.0)


def _tanh() -> Words:
    return "tanh", ()


def _sigmoid() -> Words:
    return "sigmoid", ()


def _silu(inplace: bool = False) -> Words:
    return "silu", ()


def _silu_curve(x: Tensor) -> Tensor:
    s = torch.sigmoid(x)
    return s * (1 - s) * (2 + x * (1 - 2 * s))


def _gelu(*, approximate: str = "none") -> Words:
    return {"none": "gelu", "tanh": "gelu_tanh"}[approximate], ()


def _gelu_curve(x: Tensor, approximate: str = "none") -> Tensor:
    if approximate == "none":
        return (2 - x * x) * torch.exp(-0.5 * x * x) / math.sqrt(2 * math.pi)
    c, k = math.sqrt(2 / math.pi), 0.044715
    t = torch.tanh(c * (x + k * x**3))
    inner = c * (1 + 3 * k * x * x)
    s = 1 - t * t
    return s * (inner + 0.5 * x * (6 * c * k * x) - x * t * inner * inner)


def _mish(inplace: bool = False) -> Words:
    return "mish", ()


def _selu(inplace: bool = False) -> Words:
    return "selu", ()


ACTIVATIONS = (
    Activation(
        "relu",
        _relu,
        nn.ReLU,
        (),
        (F.relu, F.relu_, torch.relu, torch.relu_, "relu", "relu_"),
        {"relu": F.relu},
        of_y(lambda v, y: aten.threshold_backward(v, y.expand_as(v), 0), None),
    ),
    Activation(
        "leaky_relu",
        _leaky_relu,
        nn.LeakyReLU,
        ("negative_slope",),
        (F.leaky_relu, F.leaky_relu_),
        {"leaky_relu": F.leaky_relu},
        of_x(lambda v, x, slope=0.01: aten.leaky_relu_backward(v, x.expand_as(v), slope, False), None),
        lambda negative_slope: negative_slope >= 0,
    ),
    Activation(
        "elu",
        _elu,
        nn.ELU,
        ("alpha",),
        (F.elu, F.elu_),
        {"elu": F.elu},
        of_y(elu_slope, elu_curve),
        lambda alpha: alpha > 0,
    ),
    Activation(
        "softplus",
        _softplus,
        nn.Softplus,
        ("beta", "threshold"),
        (F.softplus,),
        {"softplus": F.softplus},
        of_x(_softplus_slope, _softplus_curve),
        lambda beta, threshold: beta > 0,
    ),
    Activation(
        "tanh",
        _tanh,
        nn.Tanh,
        (),
        (F.tanh, torch.tanh, torch.tanh_, "tanh", "tanh_"),
        {"tanh": torch.tanh},
        of_y(lambda v, y: v * (1 - y * y), lambda y: -2 * y * (1 - y * y)),
    ),
    Activation(
        "sigmoid",
        _sigmoid,
        nn.Sigmoid,
        (),
        (F.sigmoid, torch.sigmoid, torch.sigmoid_, torch.special.expit, "sigmoid", "sigmoid_"),
        {"sigmoid": torch.sigmoid},
        of_y(lambda v, y: v * (y * (1 - y)), lambda y: y * (1 - y) * (1 - 2 * y)),
    ),
    Activation(
        "silu",
        _silu,
        nn.SiLU,
        (),
        (F.silu,),
        {"silu": F.silu},
        of_x(lambda v, x: aten.silu_backward(v, x.expand_as(v)), _silu_curve),
    ),
    Activation(
        "gelu",
        _gelu,
        nn.GELU,
        ("approximate",),
        (F.gelu,),
        {"gelu": F.gelu, "gelu_tanh": partial(F.gelu, approximate="tanh")},
        of_x(
            lambda v, x, approximate="none": aten.gelu_backward(v, x.expand_as(v), approximate=approximate),
            _gelu_curve,
        ),
    ),
    Activation("mish", _mish, nn.Mish, (), (F.mish,), {"mish": F.mish}),
    Activation("selu", _selu, nn.SELU, (), (F.selu, F.selu_, torch.selu, torch.selu_), {"selu": F.selu}),
)
_BY_OPERATOR = {activation.operator: activation for activation in ACTIVATIONS}
