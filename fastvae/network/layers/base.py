"""What a layer is: four rules around one operation, and the book in which they write gradients.

With y = f(x, theta): ``forward`` gives y; ``reverse`` the gradients of <dy, y> to x and theta; ``tangent`` the
derivative of y along xdot; ``bend`` the second-order term alone, the gradients of <dy, f_x xdot> to x and theta, which
is zero for what is linear in both.

A *dot row* may carry latents in front: where a value is [B, ...], its tangent and that tangent's cotangent are
[B, ...], or [L, B, ...] with the derivatives along L latents beside one value. Rules are written for both.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastvae.network.program import Operation

Values = list[Any]
"""What each slot of a program holds, by its number; None where nothing is kept."""


class Gradients:
    """Cotangents by number of the value, added up where a value is used more than once.

    Args:
        values: of the forward sweep, for shapes.
        wanted: by number, whether a value's cotangent is of use.
    """

    def __init__(self, values: Values, wanted: Sequence[bool]) -> None:
        self.values, self.wanted = values, wanted
        self.found: dict[int, Any] = {}

    def wants(self, index: int) -> bool:
        """Whether the gradient to a value is of use."""
        return self.wanted[index]

    def add(self, index: int, gradient: Tensor | None) -> None:
        """Add a gradient to a value, in the value's own shape or with latents in front."""
        if gradient is not None:
            known = self.found.get(index)
            self.found[index] = gradient if known is None else known + gradient

    def add_reduced(self, index: int, gradient: Tensor) -> None:
        """Add a gradient that is to be summed where the value was broadcast, and over latents."""
        self.add(index, reduced(gradient, self.values[index].shape))

    def add_part(self, index: int, part: int, gradient: Tensor) -> None:
        """Add a gradient to one of a value's parts, where an operation has several results."""
        parts = self.found.setdefault(index, {})
        known = parts.get(part)
        parts[part] = gradient if known is None else known + gradient


class Pair(NamedTuple):
    """Factors of a weight's gradient: its input, its output's cotangent, and whether that is of y itself."""

    x: Tensor
    dy: Tensor
    of_bias: bool


class Products:
    """Weight gradients: sums of products of inputs and cotangents, in a flow of 2 (K + 1) such pairs.

    Where a weight is larger than the factors, pairs wait to form one large product; otherwise each is formed at once.

    Args:
        values: by number, with the weights.
        wanted: by number, which gradients are of use.
        found: gradients by number, which are added to.
    """

    def __init__(self, values: Values, wanted: Sequence[bool], found: dict[int, Tensor]) -> None:
        self.values, self.wanted, self.found = values, wanted, found
        self.waiting: dict[int, tuple[Layer, list[Pair]]] = {}

    def add(self, layer: Layer, weight: Tensor, pair: Pair) -> None:
        """Take the factors of one use of a layer's weight."""
        if weight.numel() > pair.x.numel() + pair.dy.numel():
            self.waiting.setdefault(layer.index, (layer, []))[1].append(pair)
        else:
            self._form(layer, [pair])

    def finish(self) -> None:
        """Form what waits."""
        for layer, pairs in self.waiting.values():
            self._form(layer, pairs)
        self.waiting.clear()

    def put(self, index: int, gradient: Tensor) -> None:
        """Add to a gradient."""
        self.found[index] = self.found[index] + gradient if index in self.found else gradient

    def _form(self, layer: Layer, pairs: list[Pair]) -> None:
        for index, gradient in layer.product(self.values, pairs, self.wanted):
            self.put(index, gradient)


class Point:
    """One place where a network was evaluated: the values, and what layers keep beside them."""

    def __init__(self, values: Values, wanted: Sequence[bool]) -> None:
        self.values, self.wanted = values, wanted
        self.kept: dict[int, Any] = {}
        self.bends_later = True
        """Whether tangents and bends may follow a reverse."""


class Layer:
    """One active operation and its rules; see above.

    Args:
        operation: of the program.
        active: by number, which values depend on z.
    """

    linear = False
    """Whether ``bend`` is zero."""
    many = True
    """Whether the rules take latents in front of dot rows."""
    keeps_inputs = True
    keeps_output = True
    stops = False
    """Whether no cotangent of its result goes on to active inputs."""
    of_complex = False
    """Whether the rules hold for complex numbers, too."""
    by_autograd = False
    """Whether it is evaluated through PyTorch's autograd, as a part that no rule of ours knows."""

    def __init__(self, operation: Operation, active: Sequence[bool]) -> None:
        self.operation, self.index, self.active = operation, operation.index, active
        self.operations: tuple[Operation, ...] = (operation,)
        """All that it stands for, in order."""
        self.slots = operation.slots
        self.x = next((slot for slot in self.slots if active[slot]), -1)

    def prepare(self, values: Values) -> None:
        """Put passive values into the form that the rules like best, once a call."""

    def forward(self, point: Point) -> Any:
        """y."""
        return self.operation.call(point.values)

    def reverse(self, point: Point, dy: Any, grads: Gradients, products: Products | None) -> None:
        """Add the gradients of <dy, y>; products=None: to active inputs alone."""
        raise NotImplementedError

    def tangent(self, point: Point, dots: Values) -> Any:
        """The derivative of y along the inputs' ``dots``, not all of which are None."""
        raise NotImplementedError

    def bend(self, point: Point, dy: Any, dots: Values, grads: Gradients, products: Products) -> None:
        """Add the gradients of <dy, the derivative of y along dots>."""

    def adjoint(
        self, point: Point, dy_dot: Any, dy: Any, dots: Values, grads: Gradients, products: Products
    ) -> None:
        """Add the gradients of <dy_dot, y> + <dy, the derivative of y along dots>; None is zero."""
        if dy_dot is not None:
            self.reverse(point, dy_dot, grads, products)
        if dy is not None and any(dots[slot] is not None for slot in self.slots):
            self.bend(point, dy, dots, grads, products)

    def product(self, values: Values, pairs: list[Pair], wanted: Sequence[bool]) -> list[tuple[int, Tensor]]:
        """The gradients to weights, by number; of those that are wanted alone."""
        raise NotImplementedError


def reduced(gradient: Tensor, shape: Sequence[int]) -> Tensor:
    """Summed down to ``shape``, from which it was broadcast."""
    return gradient if gradient.shape == torch.Size(shape) else gradient.sum_to_size(tuple(shape))


def folded(dot: Tensor, rank: int) -> Tensor:
    """Latents and samples in one dimension, of a value with so many dimensions."""
    return dot if dot.dim() == rank else dot.flatten(0, 1)


def unfolded(rows: Tensor, latents: int | None) -> Tensor:
    """Latents in front again; None: there are none."""
    return rows if latents is None else rows.unflatten(0, (latents, -1))


def latents_of(dot: Tensor, rank: int) -> int | None:
    """How many latents stand in front."""
    return None if dot.dim() == rank else dot.shape[0]


def over_latents(product: Tensor, rank: int) -> Tensor:
    """Summed over latents, of a value with so many dimensions."""
    return product if product.dim() == rank else product.sum(0)


def stacked(tensors: Sequence[Tensor]) -> Tensor:
    """Rows below each other."""
    return tensors[0] if len(tensors) == 1 else torch.cat(list(tensors))


Maker = Callable[[Operation, Sequence[bool]], "Layer | None"]
MAKERS: dict[Any, Maker] = {}
"""By operator (overload packet or function): what makes its layer, or None where the arguments do not suit it."""

_registered = [0]


def registrations() -> int:
    """How many times a layer was registered: networks read before the last one are read again."""
    return _registered[0]


def layer_of(*targets: Any) -> Callable[[Maker], Maker]:
    """Register what makes the layer of ATen operators, as a decorator; what is known of an operator is replaced.

    The maker takes an operation and, by number of the value, whether it depends on z, and returns a :class:`Layer` or
    None: then autograd takes this one operation. A class of layers is a maker. Networks are read again afterwards.

    Args:
        targets: each the name of an ATen operator, left out where this torch lacks it; an operator, such as
            ``torch.ops.mine.op`` of a library of yours, with all its overloads.

    Raises:
        ValueError: this torch has none of them.
        TypeError: what is no operator, such as ``torch.erf``.
    """
    found = [each for each in map(_operator, targets) if each is not None]
    if not found:
        names = ", ".join(map(repr, targets)) or "nothing"
        raise ValueError(
            f"fastvae.network.layers.layer_of: targets: expected an operator of this torch, got {names}"
        )

    def register(maker: Maker) -> Maker:
        MAKERS.update(dict.fromkeys(found, maker))
        _registered[0] += 1
        return maker

    return register


def _operator(target: Any) -> Any:
    """As programs have it; None: this torch lacks it."""
    if isinstance(target, str):
        return getattr(torch.ops.aten, target, None)
    packet = getattr(target, "overloadpacket", target)
    if isinstance(packet, torch._ops.OpOverloadPacket) or packet is operator.getitem:
        return packet
    name = getattr(target, "__name__", repr(target))
    raise TypeError(
        f"fastvae.network.layers.layer_of: targets: expected operators, as 'erf' or torch.ops.aten.erf, got {name}"
    )


def make_layer(operation: Operation, active: Sequence[bool]) -> Layer | None:
    """The layer of an operation; None if none knows it."""
    target = operation.target
    maker = MAKERS.get(getattr(target, "overloadpacket", target))
    layer = None if maker is None else maker(operation, active)
    return None if operation.is_complex and layer is not None and not layer.of_complex else layer
