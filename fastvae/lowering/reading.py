"""Reads stock modules into layers, and keeps the shape of one sample on the way.

The shape decides what a layer means: a Linear on a [B, C, L] input acts on the last dimension only, and
``view(-1, n)`` keeps the batch first only when a sample has n elements.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

from torch import nn
from torch.nn.utils.parametrize import is_parametrized

from .activations import ACTIVATIONS, Activation, Words
from .checks import method
from .errors import CoupledSamples, ImpossibleLayer, UnsupportedLayer, describe
from .geometry import MOST, Convolution, Pair, pair

Shape = tuple["int | None", ...]


class TensorRef(NamedTuple):
    """A tensor by the path of the module that holds it, its attribute and its shape."""

    path: str
    name: str
    shape: tuple[int, ...]


Stacked = tuple[TensorRef, TensorRef]
"""Two tensors, one below the other."""


class Layer(NamedTuple):
    """One entry of a spec, with what :func:`fastvae.lowering.explain` prints about it."""

    path: str
    kind: str
    tensors: tuple[TensorRef | Stacked | None, ...]
    args: tuple[str, ...]
    shape: Shape


class Reading:
    """The layers read so far, and the shape of one sample behind them; None is a size left open.

    ``two_heads``: the network may end in two linear heads, mean and log variance, which are then one layer.
    """

    def __init__(self, shape: Shape = (None,), two_heads: bool = False) -> None:
        self.layers: list[Layer] = []
        self.shape = shape
        self.two_heads = two_heads
        self.path = ""
        self.kind = ""
        self.line = ""
        self.assigned: list[tuple[str, str]] = []
        """Attributes that a forward assigns, by path and name: why it is refused."""

    def at(self, path: str, kind: str, line: str = "") -> Reading:
        """Name the layer that is read now, for messages and for the table of ``explain``; ``line``: of a forward."""
        self.path, self.kind, self.line = path, kind, line
        return self

    def refuse(self, reason: str, error: type[ValueError] = UnsupportedLayer) -> ValueError:
        """The error that names the layer read now."""
        return error(describe(self.path, self.kind, reason) + (f" ({self.line})" if self.line else ""))

    def emit(
        self,
        kind: str,
        tensors: Iterable[TensorRef | Stacked | None] = (),
        args: Iterable[float] = (),
        shape: Shape | None = None,
    ) -> None:
        """Append a layer; numbers are written so that they read back to the same bits."""
        if shape is not None and 0 in shape:
            raise self.refuse(f"its output {render(shape)} is empty")
        numbers = []
        for value in args:
            number = value if isinstance(value, int) and not isinstance(value, bool) else float(value)
            if not math.isfinite(number):
                raise self.refuse(f"{kind} has the non-finite argument {number}")
            numbers.append(repr(number))
        self.shape = self.shape if shape is None else shape
        self.layers.append(Layer(self.path, kind, tuple(tensors), tuple(numbers), self.shape))

    def activation(self, words: Words) -> None:
        """Append an activation."""
        kind, numbers = words
        self.emit(kind, args=[float(value) for value in numbers])

    def dropout(self, p: float = 0.5, training: bool = True, inplace: bool = False) -> None:
        """Append nothing for a dropout that is off; refuse one that is on."""
        if training and p > 0:
            raise self.refuse(
                f"dropout with p={p} is in training mode, so that the network is different at every "
                "evaluation; switch the module to eval(), or set p=0",
                CoupledSamples,
            )
        self.emit("identity")

    def linear(self, weight: TensorRef, bias: TensorRef | None) -> None:
        """Append a Linear; its input must be flat."""
        out_features, in_features = weight.shape
        if len(self.shape) != 1:
            raise self.refuse(
                f"expected a flat [B, {in_features}] input, got {render(self.shape)}, where a Linear acts "
                "on the last dimension only; flatten before it"
            )
        if self.shape[0] not in (None, in_features):
            raise self.refuse(f"expected {in_features} features, got {render(self.shape)}")
        self.emit("linear", (weight, bias), shape=(out_features,))

    def stack_heads(self, first: int) -> None:
        """Make one layer of the two linear ones from layer ``first`` on, which take the same input."""
        a, b = self.layers[first:]
        pairs = list(zip(a.tensors, b.tensors, strict=False))
        same_form = all((x is None) == (y is None) for x, y in pairs)
        if a.kind != "linear" or b.kind != "linear" or not same_form:
            raise self.refuse("its two heads are not two Linear layers of one form")
        if a.shape != b.shape:
            raise self.refuse(f"its two heads differ: {render(a.shape)} and {render(b.shape)}")
        del self.layers[first:]
        stacked = [
            (x, y) if isinstance(x, TensorRef) and isinstance(y, TensorRef) else None for x, y in pairs
        ]
        self.emit("linear", stacked, shape=tuple(2 * size for size in a.shape if size is not None))

    def reshape(self, dims: Sequence[int | None]) -> None:
        """Reshape each sample; one entry may be -1, or None: a size not known here, and -1 in the spec."""
        wanted = [-1 if dim is None else int(dim) for dim in dims]
        if not wanted or wanted.count(-1) > 1 or any(dim < 1 and dim != -1 for dim in wanted):
            raise self.refuse(f"cannot reshape a sample {render(self.shape)} to {list(dims)}")
        rest = math.prod(dim for dim in wanted if dim != -1)
        size = product(self.shape)
        if size is not None and (size % rest if -1 in wanted else size != rest):
            raise self.refuse(
                f"a sample {render(self.shape)} has {size} elements and cannot be reshaped to {wanted}"
            )
        inferred = None if size is None else size // rest
        shape = tuple(inferred if dim == -1 else dim for dim in wanted)
        if shape == self.shape and (None not in shape or len(shape) == 1):
            self.emit("identity")
        else:
            self.emit("reshape", args=wanted, shape=shape)

    def flatten(self, start_dim: int = 1, end_dim: int = -1) -> None:
        """``torch.flatten`` behind the batch dimension."""
        rank = len(self.shape) + 1
        start, end = start_dim % rank, end_dim % rank
        if start == 0:
            raise self.refuse("flattens the batch dimension; use start_dim=1")
        merged = self.shape[start - 1 : end]
        if len(merged) == len(self.shape):
            self.reshape((-1,))
        else:
            self.reshape((*self.shape[: start - 1], product(merged), *self.shape[end:]))

    def unflatten(self, dim: int, sizes: Sequence[int]) -> None:
        """``torch.unflatten`` behind the batch dimension."""
        if not isinstance(dim, int) or not all(isinstance(size, int) for size in sizes):
            raise self.refuse(f"named dimensions are not supported: unflatten({dim!r}, {sizes!r})")
        axis = dim % (len(self.shape) + 1)
        if axis == 0:
            raise self.refuse("unflattens the batch dimension")
        self.reshape(self.shape[: axis - 1] + tuple(sizes) + self.shape[axis:])


def product(dims: Shape) -> int | None:
    """The number of elements, or None where a size is unknown."""
    known = [dim for dim in dims if dim is not None]
    return math.prod(known) if len(known) == len(dims) else None


def render(shape: Shape) -> str:
    """A shape for people, batch first."""
    return "[" + ", ".join(["B", *("?" if dim is None else str(dim) for dim in shape)]) + "]"


def present(module: nn.Module, name: str) -> bool:
    """Whether the module has this tensor, parametrised ones unevaluated: spectral_norm would iterate."""
    if is_parametrized(module, name):
        return True
    return getattr(module, name, None) is not None


def _ref(reading: Reading, module: nn.Module, name: str, shape: tuple[int, ...]) -> TensorRef | None:
    return TensorRef(reading.path, name, shape) if present(module, name) else None


def _weight(reading: Reading, module: nn.Module, shape: tuple[int, ...]) -> TensorRef:
    if not present(module, "weight"):
        raise reading.refuse("it has no weight")
    return TensorRef(reading.path, "weight", shape)


def _linear(reading: Reading, module: nn.Linear) -> None:
    weight = _weight(reading, module, (module.out_features, module.in_features))
    reading.linear(weight, _ref(reading, module, "bias", (module.out_features,)))


def _check_image(reading: Reading, module: nn.Conv2d | nn.ConvTranspose2d) -> None:
    if module.padding_mode != "zeros":
        raise reading.refuse(f"padding_mode={module.padding_mode!r} is not supported, only 'zeros'")
    if len(reading.shape) != 3:
        raise reading.refuse(
            f"expected a [B, {module.in_channels}, height, width] input, got {render(reading.shape)}"
        )
    if reading.shape[0] not in (None, module.in_channels):
        raise reading.refuse(f"expected {module.in_channels} channels, got {render(reading.shape)}")


def _pair(reading: Reading, module: nn.Module, name: str) -> Pair:
    try:
        return pair(getattr(module, name))
    except TypeError as error:
        raise reading.refuse(f"{name}: {error}", ImpossibleLayer) from error


def _check(reading: Reading, numbers: Convolution) -> None:
    fault = numbers.fault()
    if fault is not None:
        raise reading.refuse(fault, ImpossibleLayer)
    if numbers.largest() > MOST:
        raise reading.refuse(f"numbers beyond {MOST} are not supported, got {numbers.largest()}")


def _output(reading: Reading, channels: int, numbers: Convolution) -> Shape:
    sizes = numbers.sizes(reading.shape[1:])
    if any(size is not None and size < 1 for size in sizes):
        raise reading.refuse(
            f"a sample {render(reading.shape)} gives an empty output, of height and width {list(sizes)}",
            ImpossibleLayer,
        )
    return channels, *sizes


def _same_padding(reading: Reading, kernel: Pair, dilation: Pair) -> Pair:
    _check(reading, Convolution(kernel, (1, 1), (0, 0), dilation))
    total = [d * (k - 1) for k, d in zip(kernel, dilation, strict=True)]
    if any(amount % 2 for amount in total):
        raise reading.refuse(f"padding='same' with kernel {kernel} pads one side more than the other")
    return total[0] // 2, total[1] // 2


def _conv2d(reading: Reading, module: nn.Conv2d) -> None:
    _check_image(reading, module)
    kernel, stride, dilation = (
        _pair(reading, module, name) for name in ("kernel_size", "stride", "dilation")
    )
    if module.padding == "same":
        padding = _same_padding(reading, kernel, dilation)
    else:
        padding = (0, 0) if module.padding == "valid" else _pair(reading, module, "padding")
    numbers = Convolution(kernel, stride, padding, dilation)
    _check(reading, numbers)
    weight = _weight(reading, module, (module.out_channels, module.in_channels // module.groups, *kernel))
    bias = _ref(reading, module, "bias", (module.out_channels,))
    shape = _output(reading, module.out_channels, numbers)
    reading.emit("conv2d", (weight, bias), (*stride, *padding, *dilation, module.groups), shape)


def _conv_transpose2d(reading: Reading, module: nn.ConvTranspose2d) -> None:
    _check_image(reading, module)
    names = ("kernel_size", "stride", "padding", "dilation", "output_padding")
    kernel, stride, padding, dilation, extra = (_pair(reading, module, name) for name in names)
    numbers = Convolution(kernel, stride, padding, dilation, extra, transposed=True)
    _check(reading, numbers)
    weight = _weight(reading, module, (module.in_channels, module.out_channels // module.groups, *kernel))
    bias = _ref(reading, module, "bias", (module.out_channels,))
    args = (*stride, *padding, *extra, *dilation, module.groups)
    reading.emit("conv_transpose2d", (weight, bias), args, _output(reading, module.out_channels, numbers))


def _batch_norm(reading: Reading, module: nn.BatchNorm1d | nn.BatchNorm2d | nn.SyncBatchNorm) -> None:
    if module.training:
        raise reading.refuse(
            "it is in training mode, where a sample's output depends on its whole batch; switch the module "
            "to eval()",
            CoupledSamples,
        )
    if module.running_mean is None or module.running_var is None:
        raise reading.refuse(
            "it keeps no running statistics, so that a sample's output depends on its whole batch even in "
            "eval(); "
            "use track_running_stats=True",
            CoupledSamples,
        )
    ranks = {nn.BatchNorm1d: (1, 2), nn.BatchNorm2d: (3,)}
    allowed = next((rank for base, rank in ranks.items() if isinstance(module, base)), (1, 2, 3))
    if len(reading.shape) not in allowed or reading.shape[0] not in (None, module.num_features):
        raise reading.refuse(f"expected {module.num_features} channels first, got {render(reading.shape)}")
    size = (module.num_features,)
    tensors = [
        _ref(reading, module, name, size) for name in ("weight", "bias", "running_mean", "running_var")
    ]
    reading.emit("batch_norm", tensors, (float(module.eps),), (module.num_features, *reading.shape[1:]))


def _activation(known: Activation) -> Callable[[Reading, nn.Module], None]:
    return lambda reading, module: reading.activation(known.of_module(module))


_MODULES: dict[type[nn.Module], Callable[[Reading, Any], None]] = {
    nn.Linear: _linear,
    nn.Conv2d: _conv2d,
    nn.ConvTranspose2d: _conv_transpose2d,
    nn.BatchNorm1d: _batch_norm,
    nn.BatchNorm2d: _batch_norm,
    nn.SyncBatchNorm: _batch_norm,
    nn.Flatten: lambda reading, m: reading.flatten(m.start_dim, m.end_dim),
    nn.Unflatten: lambda reading, m: reading.unflatten(m.dim, m.unflattened_size),
    nn.Identity: lambda reading, m: reading.emit("identity"),
    **{activation.module: _activation(activation) for activation in ACTIVATIONS},
}
for _dropout in (
    nn.Dropout,
    nn.Dropout1d,
    nn.Dropout2d,
    nn.Dropout3d,
    nn.AlphaDropout,
    nn.FeatureAlphaDropout,
):
    _MODULES[_dropout] = lambda reading, m: reading.dropout(m.p, m.training)

_BEHAVIOUR = (
    "forward",
    "_conv_forward",
    "_output_padding",
    "_check_input_dim",
    "__getattr__",
    "__getattribute__",
)


def _behaviour(cls: type[nn.Module]) -> tuple[Any, ...]:
    return tuple(method(cls, name) for name in _BEHAVIOUR)


# As it is at import, so that a later replacement shows.
_STOCK = {cls: _behaviour(cls) for cls in _MODULES}


def stock_base(module: nn.Module) -> type[nn.Module] | None:
    """The stock type whose forward this module runs unchanged, or None."""
    cls = type(module)
    base = next((parent for parent in cls.__mro__ if parent in _MODULES), None)
    return base if base is not None and _behaviour(cls) == _STOCK[base] else None


def read_stock(reading: Reading, path: str, module: nn.Module) -> None:
    """Append what one stock module does; anything else is refused by name."""
    reading.at(path, type(module).__name__, reading.line)
    base = stock_base(module)
    if base is None:
        parent = next((cls.__name__ for cls in type(module).__mro__ if cls in _MODULES), None)
        if parent:
            raise reading.refuse(f"it changes the forward of {parent}")
        raise reading.refuse(
            "there is no closed form for this layer here; the layers known are "
            + ", ".join(sorted(cls.__name__ for cls in _MODULES))
        )
    _MODULES[base](reading, module)
