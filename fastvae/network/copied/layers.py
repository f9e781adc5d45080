"""Operations of which every sample has parameters of its own: how one of them runs for all samples, and its reverse.

Values that come from data are those of the whole batch, as in the program; parameters of the samples and what is made
of them alone are [B, *shape of one]. What the program says of the batch's size is 1 here: a sample is alone with its
copy.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastvae._second_order import batchable
from fastvae.network.layers import Gradients, Layer, Point, make_layer
from fastvae.network.layers.base import Products
from fastvae.network.program import Operation

from .rows import rows_of, whole_of

__all__ = [
    "BatchedLayer",
    "CopiedGradient",
    "CopiedGradients",
    "CopiedLayer",
    "CopiedPoint",
    "Kinds",
    "copied_layer_of",
    "in_full",
    "make_copied",
    "plain_layer_of",
]


class Kinds(NamedTuple):
    """What the values of a program are, by number."""

    is_copied: Sequence[bool]
    """Whether every sample has its own, which comes from parameters alone."""
    is_trained: Sequence[bool]
    """Whether it depends on what is trained."""
    axes: Sequence[Any]
    """Where what comes from data has its samples."""
    uses: Sequence[int]
    """How many operations use it."""
    device: str
    """Of which type, "cpu" or another one."""


class CopiedPoint(Point):
    """One evaluation of all copies.

    Args:
        values: by number; None where the sweep makes them.
        alone: the same for a batch of one sample, of what no sample has its own of.
        wanted: by number, which cotangents are of use.
        samples: B.
    """

    def __init__(self, values: list[Any], alone: Sequence[Any], wanted: Sequence[bool], samples: int) -> None:
        super().__init__(values, wanted)
        self.alone, self.samples = alone, samples
        self.bends_later = False


class CopiedGradients(Gradients):
    """Cotangents; those of weights may be given by their factors dy [B, R, out] and x [B, R, in], and add up."""

    def __init__(self, values: list[Any], wanted: Sequence[bool]) -> None:
        super().__init__(values, wanted)
        self.factors: dict[int, list[tuple[Tensor, Tensor]]] = {}

    def add_factors(self, index: int, dy: Tensor, x: Tensor) -> None:
        """Add dy^T x."""
        self.factors.setdefault(index, []).append((dy, x))

    def taken(self, index: int) -> Any:
        """A value's cotangent, for good: as factors if these are one row of each sample's and everything."""
        found, factors = self.found.pop(index, None), self.factors.pop(index, ())
        if not factors:
            return found
        if len(factors) == 1 and found is None and factors[0][0].shape[1] == 1:
            dy, x = factors[0]
            return dy.squeeze(1), x.squeeze(1)
        dy, x = (torch.cat(each, 1) if len(each) > 1 else each[0] for each in zip(*factors, strict=True))
        product = torch.bmm(dy.mT, x)
        return product if found is None else found + product


CopiedGradient = Tensor | tuple[Tensor, Tensor] | None
"""[B, *shape]; or the factors dy [B, out] and x [B, in] of a matrix's, [B, out, in]; or none."""


def in_full(gradient: Any) -> Any:
    """A gradient without factors."""
    if not isinstance(gradient, tuple):
        return gradient
    dy, x = gradient
    return dy.unsqueeze(2) * x.unsqueeze(1)


class CopiedLayer(Layer):
    """One operation with parameters, for all copies.

    Args:
        operation: of the program.
        kinds: see ``Kinds``.
    """

    def __init__(self, operation: Operation, kinds: Kinds) -> None:
        super().__init__(operation, kinds.is_trained)
        self.kinds = kinds

    def _rows(self, point: CopiedPoint, slot: int) -> Any:
        """A value as the samples have it, [B, *shape of one]; what none has its own of, as it is."""
        if self.kinds.is_copied[slot]:
            return point.values[slot]
        axis = self.kinds.axes[slot]
        return point.alone[slot] if axis is None else rows_of(point.values[slot], axis, point.samples)

    def _whole(self, rows: Tensor, slot: int) -> Tensor:
        """From the samples' parts a value, or its cotangent, as it is in the program."""
        return rows if self.kinds.is_copied[slot] else whole_of(rows, self.kinds.axes[slot])


class BatchedLayer(CopiedLayer):
    """Any operation by PyTorch's operators for all samples, as torch.vmap finds them, and autograd's way back."""

    keeps_output = keeps_inputs = False

    def forward(self, point: Point) -> Any:
        """y, with a graph of its own."""
        assert isinstance(point, CopiedPoint)
        slots = [
            slot for slot in self.slots if self.kinds.is_copied[slot] or self.kinds.axes[slot] is not None
        ]
        given = [self._rows(point, slot) for slot in slots]
        leaves = {}
        for place, slot in enumerate(slots):
            if self.active[slot] and isinstance(given[place], Tensor) and given[place].is_floating_point():
                given[place] = leaves[slot] = given[place].detach().requires_grad_()
        shared = {slot: point.alone[slot] for slot in self.slots if slot not in slots}

        def of_one(*own: Any) -> Any:
            return self.operation.call({**shared, **dict(zip(slots, own, strict=True))})  # type: ignore[arg-type]

        with torch.enable_grad(), batchable():
            rows = torch.vmap(of_one)(*given)
        point.kept[self.index] = leaves, rows
        if isinstance(rows, Tensor):
            return self._result(rows, self.kinds.axes[self.index])
        axes = self.kinds.axes[self.index] or [None] * len(rows)
        return [self._result(part, axis) for part, axis in zip(rows, axes, strict=True)]

    def _result(self, rows: Tensor, axis: Any) -> Tensor:
        return rows.detach() if self.kinds.is_copied[self.index] else whole_of(rows.detach(), axis)

    def reverse(self, point: Point, dy: Any, grads: Gradients, products: Products | None) -> None:
        """One vector-Jacobian product."""
        assert isinstance(point, CopiedPoint)
        leaves, rows = point.kept.pop(self.index)
        axes = self.kinds.axes[self.index]
        parts = dy if isinstance(dy, dict) else {0: dy}
        rows, axes = ([rows], [axes]) if isinstance(rows, Tensor) else (rows, axes)
        outputs, cotangents = [], []
        for place, gradient in parts.items():
            if rows[place].requires_grad:
                copied = self.kinds.is_copied[self.index]
                outputs.append(rows[place])
                cotangents.append(gradient if copied else rows_of(gradient, axes[place], point.samples))
        if not outputs or not leaves:
            return
        found = torch.autograd.grad(outputs, list(leaves.values()), cotangents, allow_unused=True)
        for slot, gradient in zip(leaves, found, strict=True):
            if gradient is not None:
                grads.add(slot, self._whole(gradient, slot))


Maker = Callable[[Operation, Kinds], "Layer | None"]
_MAKERS: dict[str, Maker] = {}


def copied_layer_of(*kinds: str) -> Callable[[Maker], Maker]:
    """Register what makes the layer of these ATen operators, or None where the arguments do not suit it."""

    def register(maker: Maker) -> Maker:
        _MAKERS.update(dict.fromkeys(kinds, maker))
        return maker

    return register


def plain_layer_of(operation: Operation, kinds: Kinds) -> Layer | None:
    """What a network without copies has in its place, where the operation's first argument comes from data."""
    x = operation.args[0]
    of_data = [False] * len(kinds.axes)
    of_data[x.index] = kinds.axes[x.index] is not None
    return make_layer(operation, of_data)


def make_copied(operation: Operation, kinds: Kinds) -> Layer:
    """The layer of an operation with parameters."""
    maker = _MAKERS.get(operation.kind)
    layer = None if maker is None else maker(operation, kinds)
    return layer or BatchedLayer(operation, kinds)
