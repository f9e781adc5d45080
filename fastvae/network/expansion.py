"""Operations that are a few simpler ones, written out, so that rules are needed for those alone."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch

from fastvae.network.program import Operation, Slot

aten = torch.ops.aten
Emit = Callable[..., Slot]


def _glu(emit: Emit, x: Slot, dim: int = -1) -> Slot:
    """a sigmoid(b) of the two halves."""
    halves = emit(aten.chunk.default, x, 2, dim)
    gate = emit(aten.sigmoid.default, emit(operator.getitem, halves, 1))
    return emit(aten.mul.Tensor, emit(operator.getitem, halves, 0), gate)


def _div(emit: Emit, a: Any, b: Any) -> Slot | None:
    """a (1 / b) for a tensor b."""
    if not isinstance(b, Slot) or not isinstance(a, Slot):
        return None
    return emit(aten.mul.Tensor, a, emit(aten.reciprocal.default, b))


def _addmm(emit: Emit, bias: Slot, a: Slot, b: Slot) -> Slot:
    """a b + bias."""
    return emit(aten.add.Tensor, emit(aten.mm.default, a, b), bias)


def _baddbmm(emit: Emit, bias: Slot, a: Slot, b: Slot) -> Slot:
    """a b + bias, of each of a batch."""
    return emit(aten.add.Tensor, emit(aten.bmm.default, a, b), bias)


def _addcmul(emit: Emit, x: Slot, a: Slot, b: Slot) -> Slot:
    """x + a b."""
    return emit(aten.add.Tensor, x, emit(aten.mul.Tensor, a, b))


_EXPANSIONS: dict[Any, Callable[..., Slot | None]] = {
    aten.glu: _glu,
    aten.div: _div,
    aten.addmm: _addmm,
    aten.baddbmm: _baddbmm,
    aten.addcmul: _addcmul,
}


def expanded(operations: Sequence[Operation], output: int) -> tuple[list[Operation], int]:
    """The operations with others written out, numbered anew, and the output's number.

    Args:
        operations: numbered one after the other.
        output: a value's number.
    """
    start = operations[0].index if operations else 0
    found: list[Operation] = []
    numbers: dict[int, int] = {}

    def moved(tree: Any) -> Any:
        if isinstance(tree, Slot):
            return Slot(numbers.get(tree.index, tree.index))
        if isinstance(tree, (list, tuple)):
            return [moved(entry) for entry in tree]
        return tree

    for operation in operations:
        args = [moved(arg) for arg in operation.args]
        kwargs = {key: moved(value) for key, value in operation.kwargs.items()}

        def emit(target: Any, *arguments: Any, name: str = operation.name) -> Slot:
            found.append(Operation(start + len(found), name, target, arguments, {}))
            return Slot(found[-1].index)

        packet = getattr(operation.target, "overloadpacket", operation.target)
        write = _EXPANSIONS.get(packet)
        last = write(emit, *args) if write is not None and not kwargs else None
        if last is None:
            found.append(Operation(start + len(found), operation.name, operation.target, args, kwargs))
            last = Slot(found[-1].index)
        numbers[operation.index] = last.index
    return found, numbers.get(output, output)
