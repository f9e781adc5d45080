"""Elements by where they are: picked by constant positions, turned over, rolled.

All are linear. Positions that repeat add up on the way back, in an order that does not depend on timing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Size, Tensor

from fastvae.network.program import Slot

from .base import Gradients, Layer, Point, Products, Values, latents_of, layer_of
from .shapes import ShapeLayer

aten = torch.ops.aten


class Picked(Layer):
    """y = x[:, positions, ...]: passive positions, of dimensions side by side behind the first."""

    linear = True
    keeps_inputs = keeps_output = False

    def _positions(self, point: Point, rank: int) -> list[Tensor | None]:
        """For each dimension of x its positions; None: all."""
        if self.operation.kind == "index":
            found: list[Tensor | None] = self.operation.arguments(point.values)[1]
            return found
        _, dim, positions = self.operation.arguments(point.values)
        return [*[None] * (dim % rank), positions.reshape(-1)]

    def forward(self, point: Point) -> Tensor:
        """y; the shape of x and the positions are kept."""
        x = point.values[self.x]
        y = self.operation.call(point.values)
        point.kept[self.index] = x.shape, y.dim(), self._positions(point, x.dim())
        return y

    def reverse(self, point: Point, dy: Tensor, grads: Gradients, products: Products | None) -> None:
        """dy, each number where it was taken from."""
        if not grads.wants(self.x):
            return
        shape, rank, positions = point.kept[self.index]
        latents = latents_of(dy, rank)
        whole = dy.new_zeros([*dy.shape[: dy.dim() - rank], *shape])
        *before, last = positions
        if dy.is_cpu and last.dim() == 1 and last.dtype != torch.bool and not any(map(_given, before)):
            # Row by row; on a GPU by atomics, in any order.
            grads.add(self.x, whole.index_add(len(before) - len(shape), last, dy))
        else:
            grads.add(self.x, aten.index_put(whole, _of_latents(positions, latents), dy, True))

    def tangent(self, point: Point, dots: Values) -> Tensor:
        """The same positions of xdot."""
        shape, _, positions = point.kept[self.index]
        return aten.index(dots[self.x], _of_latents(positions, latents_of(dots[self.x], len(shape))))


def _given(positions: Any) -> bool:
    return positions is not None


def _of_latents(positions: list[Tensor | None], latents: int | None) -> list[Tensor | None]:
    return positions if latents is None else [None, *positions]


@layer_of("index_select", "index")
def picked(operation: Any, active: Sequence[bool]) -> Layer | None:
    """aten.index_select(x, dim, positions); aten.index(x, [None, positions, ...])."""
    x, *numbers = operation.args
    if not active[x.index] or any(active[slot] for slot in operation.slots[1:]):
        return None
    if operation.kind == "index_select":
        return Picked(operation, active) if isinstance(numbers[1], Slot) else None
    # Positions along the samples are another matter, and dimensions apart are moved to the front.
    places = [place for place, positions in enumerate(numbers[0]) if _given(positions)]
    side_by_side = bool(places) and places[-1] - places[0] == len(places) - 1
    return Picked(operation, active) if side_by_side and places[0] > 0 else None


class Flip(ShapeLayer):
    """Some dimensions from their ends."""

    def move(self, dot: Tensor, latents: int | None, x: Size, y: Size) -> Tensor:
        """See ``ShapeLayer``."""
        return dot.flip([dim % len(x) - len(x) for dim in self.operation.args[1]])

    def back(self, dy: Tensor, latents: int | None, x: Size, y: Size) -> Tensor:
        """See ``ShapeLayer``."""
        return self.move(dy, latents, x, y)


class Roll(ShapeLayer):
    """Some dimensions rolled by so many positions."""

    def _rolled(self, dot: Tensor, rank: int, direction: int) -> Tensor:
        _, shifts, dims = self.operation.args
        return dot.roll([direction * shift for shift in shifts], [dim % rank - rank for dim in dims])

    def move(self, dot: Tensor, latents: int | None, x: Size, y: Size) -> Tensor:
        """See ``ShapeLayer``."""
        return self._rolled(dot, len(x), 1)

    def back(self, dy: Tensor, latents: int | None, x: Size, y: Size) -> Tensor:
        """See ``ShapeLayer``."""
        return self._rolled(dy, len(x), -1)


layer_of("flip")(Flip)


@layer_of("roll")
def roll(operation: Any, active: Sequence[bool]) -> Layer | None:
    """aten.roll(x, shifts, dims); None: without dims samples roll into each other."""
    plain = len(operation.args) == 3 and operation.slots == (operation.args[0].index,)
    return Roll(operation, active) if plain and operation.args[2] else None
